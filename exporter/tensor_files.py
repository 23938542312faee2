"""The files of a checkpoint, safetensors and torch's pickles: which tensors there are, and where each lies."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.pickle_files import dtype_name, is_pickle, unpickled
from runtime.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LAYOUTS = ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX))  # a single file counts before an index, as for transformers
FLOATS = ("F32", "F16", "BF16")  # safetensors' names of the dtypes a Nemotron checkpoint may hold

_LENGTH = struct.Struct("<Q")  # of the JSON that follows it


@dataclass(frozen=True)
class Stamp:
    """What a file's state is told by, so that one that changes while it is read is not taken for a checkpoint."""

    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        """That of a path or a descriptor."""
        found = os.stat(file)
        return cls(found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, its safetensors dtype name and its shape.

    Attributes:
        stamp: the file's when its header was read.
        offset: the first of the tensor's bytes in a safetensors file; 0 in a pickle.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    stamp: Stamp
    offset: int = 0

    @property
    def pickled(self) -> bool:
        """Whether the file is torch's pickle and not safetensors."""
        return is_pickle(self.file)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * (4 if self.dtype == "F32" else 2)

    def check_unchanged(self, found: Stamp) -> None:
        """Refuse a file that is not the one whose header was read.

        Raises:
            UserError: its stamp is another.
        """
        if found != self.stamp:
            raise UserError(
                f"{self.file} has changed or was truncated since the export began; start again when it is complete"
            )


def read_checkpoint_headers(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint directory; safetensors count where there are pickles too.

    Raises:
        UserError: no weights, a missing, damaged or inconsistent shard, or a tensor that is not fp32, fp16 or bf16.
    """
    tensors: dict[str, TensorInfo] = {}
    index, shards = _shards(path)
    for shard, expected in shards.items():
        found = read_header(shard)
        for name in sorted(expected - found.keys()):
            raise UserError(f"{shard}: tensor {name} is missing though {index} lists it; download it again")
        for name in found:
            if name in tensors:
                raise UserError(f"{shard}: tensor {name} is also in {tensors[name].file.name}; delete one of the two")
        tensors |= found
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, dtypes, shapes and places of a file's tensors; none is in memory afterwards.

    Raises:
        UserError: the file is missing or damaged, a pickle holds anything but tensors, or a tensor is not fp32, fp16
            or bf16.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: the checkpoint is incomplete; download it again")
    stamp = Stamp.of(file)
    if is_pickle(file):
        tensors = {
            name: TensorInfo(file, dtype_name(tensor), tuple(tensor.shape), stamp)
            for name, tensor in unpickled(file).items()
        }
    else:
        tensors = _of_safetensors(file, stamp)
    for name, info in tensors.items():
        if info.dtype not in FLOATS:
            raise UserError(f"{file}: tensor {name} is {info.dtype}; convert it, known: {', '.join(FLOATS)}")
    return tensors


def _of_safetensors(path: Path, stamp: Stamp) -> dict[str, TensorInfo]:
    """The library checks the header (places without holes or overlap, of the sizes of their shapes); it is read here.

    The library does not say where a tensor lies, and takes the last of two of one name.
    """
    with _told(path):
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as opened:
            known = set(opened.keys())
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            header = dict(_unique(json.loads(file.read(length), object_pairs_hook=_Pairs), path))
    header.pop("__metadata__", None)
    if header.keys() != known:
        raise UserError(f"{path} has changed since it was opened; start again when it is complete")
    tensors = {}
    for name, pairs in header.items():
        fields = dict(_unique(pairs, path))
        offset = _LENGTH.size + length + fields["data_offsets"][0]
        tensors[name] = TensorInfo(path, fields["dtype"], tuple(fields["shape"]), stamp, offset)
    return tensors


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as it stands, duplicates included."""


def _unique(pairs: list[tuple[str, Any]], path: Path) -> list[tuple[str, Any]]:
    """Pairs of a JSON object, whose last of two of one name would silently count.

    Raises:
        UserError: a name is there twice.
    """
    seen = set()
    for name, _ in pairs:
        if name in seen:
            raise UserError(f"{path} names {name} twice, and the two may differ; download it again")
        seen.add(name)
    return pairs


@contextmanager
def _told(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path} cannot be read as safetensors ({reason}); it is damaged or truncated") from error
    except RuntimeError as error:  # torch maps the whole file, which counts as memory
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"{path} cannot be mapped into memory ({reason}); free memory, or save smaller shards"
        ) from error


def _shards(path: Path) -> tuple[str, dict[Path, set[str]]]:
    """The index's name, and every file of the checkpoint with the tensors that the index expects in it."""
    for single, index in LAYOUTS:
        if (path / single).is_file():
            return index, {path / single: set()}
        if (path / index).is_file():
            return index, _indexed(path, path / index)
    known = ", ".join(name for layout in LAYOUTS for name in layout)
    raise UserError(f"{path} has no weights, which should be in one of {known}; download the checkpoint again")


def _indexed(path: Path, index: Path) -> dict[Path, set[str]]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_Pairs)
        weight_map = dict(content)["weight_map"]
        if not isinstance(weight_map, _Pairs):
            raise TypeError(f"weight_map is a {type(weight_map).__name__}")
    except OSError as error:
        raise UserError(f"cannot read {index}: {error.strerror}; change its permissions or copy it again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not an index of shards ({error!r}); download it again") from error
    shards: dict[Path, set[str]] = {}
    for name, file in _unique(weight_map, index):
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index} names {file!r}, which is not a file of this directory; download it again")
        shards.setdefault(path / file, set()).add(name)
    return shards
