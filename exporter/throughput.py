"""How fast this machine does what an export is made of, measured in about two seconds."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from exporter.origin import Origin
from exporter.recipe import Precision
from runtime.errors import UserError

_CHUNK = 8 << 20  # bytes written or read at once
_MATRIX = (1024, 4096)  # what is converted
_ROWS, _WIDTH = 256, 2048  # of the product that is timed
_STREAMED = (4096, 4096)  # a matrix beyond the caches, in fp32


@dataclass(frozen=True)
class Throughput:
    """What was measured.

    Attributes:
        write: bytes a second into the destination's file system, each piece of 8 MiB synchronised.
        read: bytes a second of the checkpoint's largest file, past the system's cache where it can be emptied.
        digest: bytes a second through sha256.
        products: floating-point operations a second of large fp32 products.
        streaming: bytes a second of fp32 weights through products of three rows, as when tokens are generated.
        converted: by precision, numbers a second that become a matrix of a bundle: cast and transposed, or rounded.
    """

    write: float
    read: float
    digest: float
    products: float
    streaming: float
    converted: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The object `measured` of the command `plan`."""
        return {
            "write_bytes_per_s": round(self.write),
            "read_bytes_per_s": round(self.read),
            "sha256_bytes_per_s": round(self.digest),
            "fp32_flop_per_s": round(self.products),
            "fp32_streaming_bytes_per_s": round(self.streaming),
            "converted_parameters_per_s": {name: round(rate) for name, rate in self.converted.items()},
        }


def measure_throughput(place: Path, largest: Path, precisions: Iterable[Precision]) -> Throughput:
    """Measure all of it.

    Args:
        place: a directory on the destination's file system.
        largest: the largest file of the checkpoint's weights.
        precisions: whose conversions are timed.

    Raises:
        UserError: nothing can be written there, or the file cannot be read.
    """
    matrix = torch.randn(_MATRIX).to(torch.bfloat16)
    data = bytes(_CHUNK)
    square, wide = torch.randn(_WIDTH, _WIDTH), torch.randn(_STREAMED)
    rows, few = torch.randn(_ROWS, _WIDTH), torch.randn(3, _STREAMED[0])
    return Throughput(
        write=_written(place),
        read=_read(largest),
        digest=_rate(len(data), lambda: hashlib.sha256(data).digest(), 0.05),
        products=_rate(2 * _ROWS * _WIDTH * _WIDTH, lambda: rows @ square, 0.1),
        streaming=_rate(4 * wide.numel(), lambda: few @ wide, 0.05),
        converted={
            precision.name: _rate(matrix.numel(), _conversion(precision, matrix), 0.08) for precision in precisions
        },
    )


def _rate(amount: int, work: Callable[[], object], seconds: float) -> float:
    """The amount a second of the fastest of some runs, after one that is not timed."""
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() > end:
            return amount / best


def _conversion(precision: Precision, matrix: torch.Tensor) -> Callable[[], object]:
    if precision.weights is not None:
        rounding = precision.weights
        return lambda: rounding.apply(matrix)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision.activations]
    return lambda: Origin("measured", transposed=True).apply(matrix, dtype)


def _written(place: Path, seconds: float = 0.4) -> float:
    piece = os.urandom(_CHUNK)  # a file system may compress
    try:
        with tempfile.TemporaryFile(dir=place, buffering=0) as file:
            started = time.perf_counter()
            done = 0
            while (taken := time.perf_counter() - started) < seconds:
                done += file.write(piece)
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write into {place}: {error.strerror}; choose another place, or free space") from error
    return done / taken


def _read(file: Path, seconds: float = 0.2) -> float:
    try:
        with file.open("rb", buffering=0) as opened:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            done = 0
            while (taken := time.perf_counter() - started) < seconds and (piece := opened.read(_CHUNK)):
                done += len(piece)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; change its permissions or copy it again") from error
    return done / taken
