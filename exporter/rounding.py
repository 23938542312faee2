"""Weights of few bits: how a matrix is rounded to the nearest point of a grid, and what the target's operator reads.

A rounding turns one matrix [out_features, in_features] into the initializers that stand for it, its parts. One matrix
is in memory at a time, and a slice of its rows in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from runtime.errors import UserError
from runtime.ort_model import import_onnxruntime

if TYPE_CHECKING:
    import torch

VALUES, SCALES, ZERO_POINTS = "values", "scales", "zero_points"
BLOCKS = (32, 64, 128)
FP8_MOST = 448.0  # the largest float8_e4m3fn
_ROWS = 4096  # rounded at once
_ZERO = 8.0  # the code of 0 in signed 4 bits

Shape = tuple[int, ...]
Parts = dict[str, tuple[ir.DataType | None, Shape]]


class Rounding(Protocol):
    """A grid, and the form in which a target's operator takes what was rounded to it."""

    @property
    def precision(self) -> str:
        """Its name, as in recipes."""
        ...

    def parts(self, shape: Shape) -> Parts:
        """Name, dtype (None: that of the activations) and shape of every part of a matrix [out, in].

        Raises:
            UserError: the operator cannot take a matrix of this shape.
        """
        ...

    def apply(self, matrix: torch.Tensor) -> dict[str, NDArray[Any]]:
        """Round a matrix [out, in] of any float dtype: every part as its bytes are stored, scales in float32."""
        ...

    def nearest(self, matrix: torch.Tensor) -> torch.Tensor:
        """The numbers, float32 [out, in], that a float32 matrix is about rounded to: to judge by, not to store."""
        ...


@dataclass(frozen=True)
class Grid:
    """Where a block of each row may be rounded to: (code − zero) · scale, of codes 0 … top.

    Attributes:
        scale: float32 [out, 1], not 0.
        zero: the code of 0, whole numbers in float32 [out, 1].
        top: the largest code.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    top: int

    def codes(self, numbers: torch.Tensor) -> torch.Tensor:
        """The nearest codes to numbers [out, n], in float32."""
        return ((numbers / self.scale).round() + self.zero).clamp(0, self.top)

    def numbers(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes [out, n] stand for."""
        return (codes - self.zero) * self.scale


class BlockRounding(Rounding, Protocol):
    """A rounding whose blocks of in_features have a grid of their own, so that others may choose the codes."""

    @property
    def block(self) -> int:
        """Weights that share a scale."""
        ...

    def grid(self, block: torch.Tensor) -> Grid:
        """The grid of a block [out, up to `block`], float32."""
        ...

    def pack(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, NDArray[Any]]:
        """The parts of codes [out, in], whose blocks have these scales and zeros [out, blocks]."""
        ...


@dataclass(frozen=True)
class BlockNBits:
    """Blocks along in_features as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them, by its own quantiser.

    Attributes:
        bits: 4 or 8.
        block: weights that share a scale, one of `BLOCKS`.
        symmetric: whether the middle of the grid is zero; otherwise each block has a zero point.
    """

    bits: int
    block: int
    symmetric: bool

    @property
    def precision(self) -> str:
        """`int4` or `int8`."""
        return f"int{self.bits}"

    def parts(self, shape: Shape) -> Parts:
        """Values uint8 [out, blocks, bytes], scales [out, blocks], zero points uint8 [out, bytes]."""
        out, width = shape
        blocks = -(-width // self.block)
        parts: Parts = {
            VALUES: (ir.DataType.UINT8, (out, blocks, self.block * self.bits // 8)),
            SCALES: (None, (out, blocks)),
        }
        if not self.symmetric:
            parts[ZERO_POINTS] = (ir.DataType.UINT8, (out, -(-blocks * self.bits // 8)))
        return parts

    def apply(self, matrix: torch.Tensor) -> dict[str, NDArray[Any]]:
        """Round slices of rows, whose blocks do not depend on each other."""
        import_onnxruntime()
        from onnxruntime.capi import onnxruntime_pybind11_state as library

        quantize = {4: library.quantize_matmul_4bits, 8: library.quantize_matmul_8bits}[self.bits]
        asymmetric = BlockNBits(self.bits, self.block, False).parts(tuple(matrix.shape))
        found = {
            name: np.zeros(shape, np.float32 if name == SCALES else np.uint8) for name, (_, shape) in asymmetric.items()
        }
        for rows, part in _slices(matrix):
            columns = np.ascontiguousarray(part.T)  # [in, out] is what it reads
            pieces = [np.ascontiguousarray(found[name][rows]) for name in (VALUES, SCALES, ZERO_POINTS)]
            quantize(
                pieces[0],
                columns,
                pieces[1].reshape(-1),
                pieces[2].reshape(-1),
                self.block,
                columns.shape[1],
                columns.shape[0],
                self.symmetric,
            )
            for name, piece in zip((VALUES, SCALES, ZERO_POINTS), pieces, strict=True):
                found[name][rows] = piece
        return {name: found[name] for name in self.parts(tuple(matrix.shape))}

    def grid(self, block: torch.Tensor) -> Grid:
        """From the least to the most number, 0 between them; symmetric: the larger magnitude is code 0, the lowest."""
        import torch

        top, middle = (1 << self.bits) - 1, float(1 << self.bits - 1)
        least, most = block.amin(1, keepdim=True).clamp(max=0), block.amax(1, keepdim=True).clamp(min=0)
        if self.symmetric:
            scale = _not_zero(torch.where(-least > most, least, most) / -middle)
            return Grid(scale, torch.full_like(scale, middle), top)
        scale = _not_zero((most - least) / top)
        return Grid(scale, (-least / scale).round().clamp(0, top), top)

    def nearest(self, matrix: torch.Tensor) -> torch.Tensor:
        """By `grid`."""
        return _nearest(self, matrix)

    def pack(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, NDArray[Any]]:
        """As `parts` has them, the last block filled up with codes of 0."""
        import torch

        (out, blocks), width = scales.shape, codes.shape[1]
        filled = torch.nn.functional.pad(codes, (0, blocks * self.block - width)).to(torch.uint8).numpy()
        found = {VALUES: self._bytes(filled).reshape(out, blocks, -1), SCALES: scales.numpy()}
        if not self.symmetric:
            found[ZERO_POINTS] = self._bytes(zeros.to(torch.uint8).numpy())
        return found

    def _bytes(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Codes [out, n] in bytes, of 4 bits the lower half first."""
        if self.bits == 8:
            return codes
        even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
        packed: NDArray[np.uint8] = even[:, ::2] | even[:, 1::2] << np.uint8(4)
        return packed


@dataclass(frozen=True)
class BlockInt4:
    """Symmetric blocks along in_features as DequantizeLinear reads them: signed, the scale above 0 (TensorRT)."""

    block: int

    @property
    def precision(self) -> str:
        """`int4`."""
        return "int4"

    def parts(self, shape: Shape) -> Parts:
        """Values int4 [in, out], two to a byte, scales [in / block, out]."""
        out, width = shape
        if width % self.block:
            raise UserError(
                f"a matrix of {width} input features is not a whole number of blocks of {self.block}, which TensorRT "
                "needs; name its layer in a recipe with a 16-bit precision, or export with --precision fp8 or fp16"
            )
        return {VALUES: (ir.DataType.INT4, (width, out)), SCALES: (None, (width // self.block, out))}

    def apply(self, matrix: torch.Tensor) -> dict[str, NDArray[Any]]:
        """Each block by its `grid`."""
        import torch

        codes = torch.empty(matrix.shape, dtype=torch.uint8)
        scales = torch.empty(matrix.shape[0], matrix.shape[1] // self.block)
        for rows, part in _slices(matrix):
            for index, block in enumerate(torch.split(torch.from_numpy(part), self.block, 1)):
                grid = self.grid(block)
                codes[rows, index * self.block : (index + 1) * self.block] = grid.codes(block).to(torch.uint8)
                scales[rows, index] = grid.scale[:, 0]
        return self.pack(codes, scales, torch.full_like(scales, _ZERO))

    def grid(self, block: torch.Tensor) -> Grid:
        """Scale is the block's largest magnitude / 7, so that the grid −8 … 7 holds both ends."""
        import torch

        scale = _not_zero(block.abs().amax(1, keepdim=True) / 7)
        return Grid(scale, torch.full_like(scale, _ZERO), 15)

    def nearest(self, matrix: torch.Tensor) -> torch.Tensor:
        """By `grid`."""
        return _nearest(self, matrix)

    def pack(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, NDArray[Any]]:
        """As `parts` has them: code − zero in 4 bits of two's complement."""
        import torch

        signed = codes.to(torch.int8) - zeros.to(torch.int8).repeat_interleave(self.block, 1)
        flat = signed.numpy().T.reshape(-1).view(np.uint8) & 15
        flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
        return {VALUES: flat[::2] | flat[1::2] << 4, SCALES: np.ascontiguousarray(scales.numpy().T)}


@dataclass(frozen=True)
class ChannelFp8:
    """float8_e4m3fn with one scale per output channel, as DequantizeLinear reads it (TensorRT)."""

    @property
    def precision(self) -> str:
        """`fp8`."""
        return "fp8"

    def parts(self, shape: Shape) -> Parts:
        """Values float8 [in, out], scales [out]."""
        return {VALUES: (ir.DataType.FLOAT8E4M3FN, shape[::-1]), SCALES: (None, shape[:1])}

    def apply(self, matrix: torch.Tensor) -> dict[str, NDArray[Any]]:
        """Scale is the channel's largest magnitude / 448."""
        import torch

        out, width = matrix.shape
        values = np.empty((width, out), np.uint8)
        scales = np.empty(out, np.float32)
        for rows, part in _slices(matrix):
            most = np.abs(part).max(1)
            scale = np.where(most == 0, 1.0, most / FP8_MOST).astype(np.float32)
            rounded = torch.from_numpy(part.T / scale).to(torch.float8_e4m3fn)
            values[:, rows] = rounded.view(torch.uint8).numpy()
            scales[rows] = scale
        return {VALUES: values, SCALES: scales}

    def nearest(self, matrix: torch.Tensor) -> torch.Tensor:
        """By the same scale."""
        import torch

        scale = _not_zero(matrix.abs().amax(1, keepdim=True) / FP8_MOST)
        return (matrix / scale).to(torch.float8_e4m3fn).float() * scale


def _nearest(rounding: BlockRounding, matrix: torch.Tensor) -> torch.Tensor:
    import torch

    found = []
    for block in torch.split(matrix, rounding.block, 1):
        grid = rounding.grid(block)
        found.append(grid.numbers(grid.codes(block)))
    return torch.cat(found, 1)


def _not_zero(scale: torch.Tensor) -> torch.Tensor:
    """Scales of blocks of zeros are of no matter, but not 0."""
    return scale.masked_fill(scale == 0, 1.0)


def _slices(matrix: torch.Tensor) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Slices of rows in fp32."""
    for start in range(0, matrix.shape[0], _ROWS):
        rows = slice(start, min(start + _ROWS, matrix.shape[0]))
        yield rows, matrix[rows].float().numpy()
