"""Weights of 8 and 4 bits as DequantizeLinear reads them, in the forms that TensorRT fuses into a product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from exporter.rounding.base import SCALES, VALUES, Grid, Parts, Shape, nearest_points, not_zero, pack_pairs, slices
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

    @property
    def axis(self) -> int:
        """Rows become columns."""
        return -1

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

        out, width = matrix.shape
        codes = torch.empty(out, width, dtype=torch.uint8)
        scales = torch.empty(out, width // self.block)
        for rows, part in slices(matrix):
            blocks = part.view(-1, self.block)
            grid = self.grid(blocks)
            codes[rows] = grid.codes(blocks).to(torch.uint8).view(-1, width)
            scales[rows] = grid.scale.view(-1, width // self.block)
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

        out, width = codes.shape
        signed = codes.to(torch.uint8).view(out, -1, self.block) - zeros.to(torch.uint8)[..., None]
        flat = (signed & 15).view(out, width).t().reshape(1, -1)
        if flat.shape[1] % 2:
            flat = torch.nn.functional.pad(flat, (0, 1))
        return {VALUES: pack_pairs(flat)[0].numpy(), SCALES: scales.t().contiguous().numpy()}


@dataclass(frozen=True)
class ChannelFp8:
    """float8_e4m3fn with one scale per output channel, as DequantizeLinear reads it (TensorRT)."""

    @property
    def precision(self) -> str:
        """`fp8`."""
        return "fp8"

    @property
    def axis(self) -> int:
        """Rows become columns."""
        return -1

    def parts(self, shape: Shape) -> Parts:
        """Values float8 [in, out], scales [out]."""
        return {VALUES: ("FLOAT8E4M3FN", shape[::-1]), SCALES: (None, shape[:1])}

    def apply(self, matrix: torch.Tensor) -> dict[str, NDArray[Any]]:
        """Scale is the channel's largest magnitude / 448."""
        import torch

        values = torch.empty(matrix.shape, dtype=torch.uint8)
        scales = torch.empty(matrix.shape[0])
        for rows, part in slices(matrix):
            scale = not_zero(part.abs().amax(1, keepdim=True) / FP8_MOST)
            values[rows] = (part / scale).to(torch.float8_e4m3fn).view(torch.uint8)
            scales[rows] = scale[:, 0]
        return {VALUES: values.t().contiguous().numpy(), SCALES: scales.numpy()}

    def nearest(self, matrix: torch.Tensor) -> torch.Tensor:
        """By the same scale."""
        import torch

        scale = not_zero(matrix.abs().amax(1, keepdim=True) / FP8_MOST)
        return (matrix / scale).to(torch.float8_e4m3fn).float() * scale
