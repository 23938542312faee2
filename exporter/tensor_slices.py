"""Tensors read some rows at a time, by position: a mapped file would count as memory to its last page."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from exporter.pickle_files import unpickled
from exporter.tensor_files import Stamp, TensorInfo
from runtime.errors import UserError

if TYPE_CHECKING:
    import torch

SLICE_BYTES = 1 << 24  # of a tensor at once: larger ones leave the processor's caches, smaller ones are short writes
WIDE_BYTES = 1 << 26  # the same of what is written as columns: a slice of few rows is runs that fill pages in parts
EVEN = 64  # slices begin at multiples of it, so that rows of a few bits each begin on a byte

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of memory that numpy asked for: in huge pages, where torch's would be faulted in by small ones."""
    import torch

    memory = np.empty(math.prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor of floats holds neither NaN nor infinity; many times as fast as asking each number."""
    import torch

    if not tensor.numel():
        return True
    least, most = torch.aminmax(tensor)  # NaN if any is
    return bool(torch.isfinite(least) & torch.isfinite(most))


def content(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_tensor(name: str, info: TensorInfo) -> torch.Tensor:
    """One tensor in its stored dtype and shape, contiguous, in memory of its own.

    Raises:
        UserError: the file cannot be read or has changed, or the tensor holds NaN or infinity.
    """
    return read_rows(name, info, slice(None)).view(info.shape)


def rows_at_once(shape: tuple[int, ...], itemsize: int, *, wide: bool = False) -> int:
    """How many rows of a tensor, at its stored size, are about a slice's bytes; a multiple of `EVEN`."""
    size = WIDE_BYTES if wide else SLICE_BYTES
    return max(1, size // max(1, math.prod(shape[1:]) * itemsize * EVEN)) * EVEN


def read_slices(name: str, info: TensorInfo, *, wide: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
    """A tensor's slices along its first axis, in order, each with the index of its first row; a scalar is one row.

    Args:
        name: of the tensor.
        info: where it lies.
        wide: slices of `WIDE_BYTES`, for what is written as columns.

    Raises:
        UserError: the file cannot be read or has changed, or a slice holds NaN or infinity.
    """
    shape = _shape(info)
    rows = rows_at_once(shape, _dtype(info).itemsize, wide=wide)
    for start in range(0, max(shape[0], 1), rows):
        yield start, read_rows(name, info, slice(start, start + rows))


def read_rows(name: str, info: TensorInfo, rows: slice) -> torch.Tensor:
    """Some rows of a tensor, contiguous, in memory of their own.

    Raises:
        UserError: the file cannot be read or has changed, or they hold NaN or infinity.
    """
    dtype, shape = _dtype(info), _shape(info)
    start, stop, _ = rows.indices(shape[0])
    tensor = empty((stop - start, *shape[1:]), dtype)
    if info.pickled:
        _copy_of_pickle(name, info, start, tensor)
    else:
        _read_of_safetensors(info, info.offset + start * math.prod(shape[1:]) * dtype.itemsize, tensor)
    if not all_finite(tensor):
        raise UserError(f"{info.file}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
    return tensor


def read_into(descriptor: int, buffer: memoryview, at: int, path: Path) -> int:
    """Fill a buffer from a place of a file, and say where what follows begins.

    Raises:
        UserError: the file ends before.
    """
    while buffer:
        done = os.preadv(descriptor, [buffer], at)
        if not done:
            raise UserError(f"{path} ends {len(buffer)} bytes early: it was truncated; download it again")
        buffer, at = buffer[done:], at + done
    return at


def _shape(info: TensorInfo) -> tuple[int, ...]:
    return info.shape or (1,)


def _dtype(info: TensorInfo) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, _DTYPES[info.dtype])
    return dtype


def _read_of_safetensors(info: TensorInfo, at: int, into: torch.Tensor) -> None:
    """Fill a tensor from a place of the file."""
    with _readable(info), info.file.open("rb", buffering=0) as file:
        info.check_unchanged(Stamp.of(file.fileno()))
        read_into(file.fileno(), content(into), at, info.file)
        info.check_unchanged(Stamp.of(file.fileno()))


def _copy_of_pickle(name: str, info: TensorInfo, start: int, into: torch.Tensor) -> None:
    """Fill a tensor with rows from a mapping of its own, whose pages leave memory with it."""
    with _readable(info):
        info.check_unchanged(Stamp.of(info.file))
        tensor = unpickled(info.file)[name].detach()
        into.copy_(tensor[start : start + len(into)] if info.shape else tensor)
        info.check_unchanged(Stamp.of(info.file))


@contextmanager
def _readable(info: TensorInfo) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {info.file}: {error.strerror}; mend it and start again") from error
