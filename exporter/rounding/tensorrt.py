"""Weights of 8 and 4 bits as DequantizeLinear reads them, in the forms that TensorRT fuses into a product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.rounding.base import SCALES, VALUES, Grid, Parts, Shape, nearest_points, not_zero, slices
from runtime.errors import UserError

if TYPE_CHECKING:
    import torch

FP8_MOST = 448.0  # the largest float8_e4m3fn
_ZERO = 8.0  # the code of 0 in signed 4 bits


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
        return {VALUES: ("INT4", (width, out)), SCALES: (None, (width // self.block, out))}

    def apply(self, matrix: torch.Tensor) -> dict[str, NDArray[Any]]:
        """Each block by its `grid`."""
        import torch

        codes = torch.empty(matrix.shape, dtype=torch.uint8)
        scales = torch.empty(matrix.shape[0], matrix.shape[1] // self.block)
        for rows, part in slices(matrix):
            for index, block in enumerate(torch.split(torch.from_numpy(part), self.block, 1)):
                grid = self.grid(block)
                codes[rows, index * self.block : (index + 1) * self.block] = grid.codes(block).to(torch.uint8)
                scales[rows, index] = grid.scale[:, 0]
        return self.pack(codes, scales, torch.full_like(scales, _ZERO))

    def grid(self, block: torch.Tensor) -> Grid:
        """Scale is the block's largest magnitude / 7, so that the grid −8 … 7 holds both ends."""
        import torch

        scale = not_zero(block.abs().amax(1, keepdim=True) / 7)
        return Grid(scale, torch.full_like(scale, _ZERO), 15)

    def nearest(self, matrix: torch.Tensor) -> torch.Tensor:
        """By `grid`."""
        return nearest_points(self, matrix)

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
        return {VALUES: ("FLOAT8E4M3FN", shape[::-1]), SCALES: (None, shape[:1])}

    def apply(self, matrix: torch.Tensor) -> dict[str, NDArray[Any]]:
        """Scale is the channel's largest magnitude / 448."""
        import torch

        out, width = matrix.shape
        values = np.empty((width, out), np.uint8)
        scales = np.empty(out, np.float32)
        for rows, part in slices(matrix):
            most = np.abs(part).max(1)
            scale = np.where(most == 0, 1.0, most / FP8_MOST).astype(np.float32)
            rounded = torch.from_numpy(part.T / scale).to(torch.float8_e4m3fn)
            values[:, rows] = rounded.view(torch.uint8).numpy()
            scales[rows] = scale
        return {VALUES: values, SCALES: scales}

    def nearest(self, matrix: torch.Tensor) -> torch.Tensor:
        """By the same scale."""
        import torch

        scale = not_zero(matrix.abs().amax(1, keepdim=True) / FP8_MOST)
        return (matrix / scale).to(torch.float8_e4m3fn).float() * scale
