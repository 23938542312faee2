"""What initializers hold, read from their file when it is asked for, whole or in part."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

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
    shape, dtype, offset = _shape(tensor), tensor.dtype.numpy(), tensor.offset or 0
    size = dtype.itemsize
    if not math.prod(shape):
        return np.empty(shape, dtype)[(*[WHOLE] * (axis % len(shape)), part)]
    raw = np.memmap(tensor.path, np.uint8, "r", offset, (math.prod(shape) * size,))
    rows: NDArray[np.uint8] = raw.reshape(*shape[:-1], shape[-1] * size)
    if axis % len(shape) == len(shape) - 1:
        start, stop, _ = part.indices(shape[-1])
        rows = rows[..., start * size : stop * size]
    else:
        rows = rows[(*[WHOLE] * axis, part)]
    found = rows.copy().view(dtype) if offset % size else rows.view(dtype)
    return found.reshape(tensor.shape.numpy()) if part == WHOLE else found


def _shape(tensor: ir.ExternalTensor) -> tuple[int, ...]:
    """Its shape; a scalar's is that of one number."""
    return tuple(map(int, tensor.shape.numpy())) or (1,)


def _unpacked(tensor: ir.ExternalTensor, part: slice, axis: int) -> NDArray[np.int8]:
    """Numbers of 4 bits in two's complement, of which a byte holds two, the lower half first."""
    shape = _shape(tensor)
    packed: NDArray[np.uint8] = np.memmap(tensor.path, np.uint8, "r", tensor.offset or 0, (-(-tensor.size // 2),))
    if part != WHOLE:
        if axis % len(shape) != len(shape) - 1 or any(edge % 2 for edge in (*part.indices(shape[-1])[:2], shape[-1])):
            raise ValueError(f"a part of int4 {list(shape)} is of an even run of its last axis, not {part}")
        start, stop, _ = part.indices(shape[-1])
        shape = (*shape[:-1], stop - start)
        packed = packed.reshape(-1, _shape(tensor)[-1] // 2)[:, start // 2 : stop // 2]
    both = np.stack([packed & 15, packed >> 4], -1).astype(np.int8).reshape(-1)
    return np.where(both > 7, both - 16, both)[: int(np.prod(shape))].reshape(shape)
