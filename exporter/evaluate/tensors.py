"""What initializers hold, read from their file when it is asked for, whole or in part."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from runtime.errors import UserError

WHOLE = slice(None)


def read_tensor(tensor: ir.TensorProtocol, part: slice = WHOLE, axis: int = 0) -> torch.Tensor:
    """An initializer's content, or a part of it along an axis; int4 in a byte each.

    What is in a file is mapped by itself and for as long as the result lives: a whole file that stays mapped would
    count as memory wherever it has been read.

    Args:
        tensor: of any dtype that the evaluation knows.
        part: which indices of the axis; of int4 they begin and end at even ones.
        axis: of the tensor's shape.
    """
    if not isinstance(tensor, ir.ExternalTensor):
        array = tensor.numpy()
        array = array[(*[WHOLE] * (axis % max(array.ndim, 1)), part)] if part != WHOLE else array
    elif tensor.dtype == ir.DataType.INT4:
        return as_torch(_unpacked(tensor, part, axis))
    else:
        array = _mapped(tensor, part, axis)
    if tensor.dtype == ir.DataType.BFLOAT16:
        return as_torch(array.view(np.int16)).view(torch.bfloat16)
    if tensor.dtype == ir.DataType.FLOAT8E4M3FN:
        return as_torch(array.view(np.uint8)).view(torch.float8_e4m3fn)
    if tensor.dtype == ir.DataType.INT4:
        return as_torch(array.astype(np.int8))
    return as_torch(array)


def as_torch(array: NDArray[Any]) -> torch.Tensor:
    """The same memory as a tensor; that it may be read-only does not matter, for nothing here writes to a weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def _mapped(tensor: ir.ExternalTensor, part: slice, axis: int) -> NDArray[Any]:
    """As `tensor.numpy()`, which refuses files that have other names: those of checkpoints, which bundles link."""
    shape, dtype = _shape(tensor), tensor.dtype.numpy()
    if part != WHOLE and len(shape) > 1 and axis % len(shape) == len(shape) - 1:
        start, stop, _ = part.indices(shape[-1])
        strip = _strip(tensor, dtype.itemsize * shape[-1], dtype.itemsize * start, dtype.itemsize * stop)
        return strip.view(dtype).reshape(*shape[:-1], -1)
    if not math.prod(shape):
        return np.empty(shape, dtype)[(*[WHOLE] * axis, part)]
    raw = np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (math.prod(shape) * dtype.itemsize,))
    rows = raw.reshape(*shape[:-1], shape[-1] * dtype.itemsize)
    found = (rows.copy() if (tensor.offset or 0) % dtype.itemsize else rows).view(dtype)[(*[WHOLE] * axis, part)]
    return found.reshape(tensor.shape.numpy()) if part == WHOLE else found


def _strip(tensor: ir.ExternalTensor, width: int, start: int, stop: int) -> NDArray[np.uint8]:
    """Bytes start…stop of every row of a tensor whose rows are of `width` bytes, uint8 [rows, stop − start].

    They are read, not mapped: the system maps many pages about each that is touched.
    """
    rows = math.prod(_shape(tensor)[:-1])
    found = np.empty((rows, stop - start), np.uint8)
    with open(tensor.path, "rb", buffering=0) as file:
        for row, into in enumerate(found):
            if os.preadv(file.fileno(), [into.data], (tensor.offset or 0) + row * width + start) != stop - start:
                raise UserError(f"{tensor.path} ends early: it was truncated; export the bundle again")
    return found


def _shape(tensor: ir.ExternalTensor) -> tuple[int, ...]:
    """Its shape; a scalar's is that of one number."""
    return tuple(map(int, tensor.shape.numpy())) or (1,)


def _unpacked(tensor: ir.ExternalTensor, part: slice, axis: int) -> NDArray[np.int8]:
    """Numbers of 4 bits in two's complement, of which a byte holds two, the lower half first."""
    shape = _shape(tensor)
    if part == WHOLE:
        packed: NDArray[np.uint8] = np.memmap(
            tensor.path, np.uint8, "r", tensor.offset or 0, (-(-math.prod(shape) // 2),)
        )
    else:
        start, stop, _ = part.indices(shape[-1])
        if axis % len(shape) != len(shape) - 1 or any(edge % 2 for edge in (start, stop, shape[-1])):
            raise ValueError(f"a part of int4 {list(shape)} is of an even run of its last axis, not {part}")
        packed, shape = _strip(tensor, shape[-1] // 2, start // 2, stop // 2), (*shape[:-1], stop - start)
    both = np.stack([packed & 15, packed >> 4], -1).astype(np.int8).reshape(-1)
    return np.where(both > 7, both - 16, both)[: math.prod(shape)].reshape(shape)
