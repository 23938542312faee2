"""Operators that read weights of few bits."""

from __future__ import annotations

from functools import partial

import torch

from exporter.evaluate.onnx_attributes import Attributes
from exporter.evaluate.program import CannotEvaluate, Compute

Tensor = torch.Tensor


def from_blocks(values: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, block: int) -> Tensor:
    """A matrix of blocks along its rows in fp32: (value − zero point) · scale, as ONNX Runtime's schemas have it.

    Args:
        values: uint8 [rows, …], of 4 bits the lower half of a byte first.
        scales: [rows, blocks].
        zero_points: uint8 [rows, bytes], packed likewise; None for the middle of the range.
        bits: 4 or 8.
        block: numbers that share a scale.

    Returns:
        float32 [rows, blocks · block]: the last block may be padded.
    """
    rows, blocks = scales.shape
    spread = partial(_unpacked, bits=bits)
    numbers = spread(values.reshape(rows, -1)).reshape(rows, blocks, block).float()
    middle = (
        torch.tensor(float(1 << bits - 1)) if zero_points is None else spread(zero_points)[:, :blocks, None].float()
    )
    return ((numbers - middle) * scales.float()[..., None]).reshape(rows, -1)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def dequantized(values: Tensor, scales: Tensor, axis: int, block: int) -> Tensor:
    """`DequantizeLinear` without zero points, in fp32: blocks of an axis, or one scale for each index of it (0)."""
    if block:
        return values.float() * scales.float().repeat_interleave(block, axis)[: values.shape[0]]
    shape = [-1 if place == axis % values.ndim else 1 for place in range(values.ndim)]
    return values.float() * scales.float().reshape(shape)


def matmul_nbits(a: Attributes) -> Compute:
    """`com.microsoft::MatMulNBits` with the activations as they are, whatever `accuracy_level` allows."""
    bits, block, width = a.only("bits", 4, 8), a.get("block_size"), a.get("K")
    a.get("N")
    a.get("accuracy_level", 0)

    def compute(x: Tensor, values: Tensor, scales: Tensor, zero_points: Tensor | None = None) -> Tensor:
        return x.float() @ from_blocks(values, scales, zero_points, bits, block)[:, :width].T

    return compute


def gather_blocks(a: Attributes) -> Compute:
    """`com.microsoft::GatherBlockQuantized` of rows that are rounded along their second axis."""
    bits, block = a.only("bits", 4, 8), a.get("block_size")
    a.only("gather_axis", 0)
    a.only("quantize_axis", 1)

    def compute(values: Tensor, rows: Tensor, scales: Tensor, zero_points: Tensor | None = None) -> Tensor:
        flat = rows.reshape(-1)
        points = None if zero_points is None else zero_points[flat]
        return from_blocks(values[flat], scales[flat], points, bits, block).reshape(*rows.shape, -1)

    return compute


def dequantize_linear(a: Attributes) -> Compute:
    """`DequantizeLinear` of a matrix without zero points."""
    axis, block = a.get("axis", 1), a.get("block_size", 0)
    if block and axis:
        raise CannotEvaluate(f"blocks along axis {axis} of {a.label}")
    return lambda values, scales: dequantized(values, scales, axis, block)
