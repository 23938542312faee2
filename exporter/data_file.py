"""The bundle's data file: written in pieces, in any order and from several threads, and hashed as it fills up."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx_ir as ir

from exporter.file_digest import FileDigest
from runtime.manifest import FileRecord


@dataclass(frozen=True)
class Place:
    """Where an initializer lies: bytes `offset` to `end` of the file, of this shape and bits of an element."""

    offset: int
    shape: tuple[int, ...]
    bits: int

    @property
    def size(self) -> int:
        """In bytes, elements of few bits packed without gaps."""
        return -(-math.prod(self.shape) * self.bits // 8)

    @property
    def end(self) -> int:
        """Where it ends."""
        return self.offset + self.size

    @property
    def lines(self) -> int:
        """Runs of elements along the last axis."""
        return math.prod(self.shape[:-1])

    @property
    def columns_are_bytes(self) -> bool:
        """Whether every line begins on a byte, so that blocks of columns can be written by themselves."""
        return self.shape[-1] * self.bits % 8 == 0


class DataFile:
    """A new file, open for writing. Places are added in the order of their offsets, before anything is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: list[Place] = []
        self._done: dict[Place, int] = {}
        self._file = path.open("w+b", buffering=0)
        self._digest = FileDigest(self._file.fileno(), path)
        self._first = 0  # of the places that are not finished

    def add(self, place: Place) -> None:
        """Reserve a place behind the others."""
        self.places.append(place)
        self._done[place] = 0

    def write_rows(self, place: Place, start: int, data: memoryview) -> None:
        """Write what begins at an index of a place's first axis."""
        self._write(place.offset + place.size // max(1, place.shape[0]) * start, data)

    def write_columns(self, place: Place, start: int, data: memoryview) -> None:
        """Write a block of columns [lines, columns], which begins at an index of a place's last axis."""
        if len(data) == place.size:
            self._write(place.offset, data)
            return
        pitch, width = place.size // place.lines, len(data) // place.lines
        at = place.offset + start * place.bits // 8
        for line in range(place.lines):
            self._write(at + line * pitch, data[line * width : (line + 1) * width])

    def finished(self, place: Place, size: int) -> None:
        """Note that the first bytes of a place are written, so that they can be hashed.

        Raises:
            OSError: what was written before could not be read again.
        """
        self._done[place] = size
        while self._first < len(self.places) and self._done[self.places[self._first]] == self.places[self._first].size:
            self._first += 1
        if self._first < len(self.places) and self._done[self.places[self._first]]:
            here = self.places[self._first]
            self._digest.to(here.offset + self._done[here])
        elif self._first:  # not the gap behind it, which is there once the next place is written
            self._digest.to(self.places[self._first - 1].end)

    def record(self) -> FileRecord:
        """Hash and size of the file, once every place is finished.

        Raises:
            OSError: it could not be read again.
        """
        assert self._first == len(self.places), "every place is finished"
        return self._digest.record()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._digest.__exit__(kind, error, trace)
        finally:
            self._file.close()

    def _write(self, at: int, data: memoryview) -> None:
        while data:
            done = os.pwrite(self._file.fileno(), data, at)
            data, at = data[done:], at + done


def lay_out(file: DataFile, values: Sequence[ir.Value], alignment: int) -> list[Place]:
    """Places for initializers, one after the other; each begins at a multiple of the alignment."""
    places = []
    for value in values:
        assert value.shape is not None
        assert value.dtype is not None
        end = file.places[-1].end if file.places else 0
        shape = tuple(int(dim) for dim in value.shape.numpy())
        places.append(Place(-(-end // alignment) * alignment, shape, value.dtype.bitwidth))
        file.add(places[-1])
    return places
