"""Weights of 8 and 4 bits as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.rounding.base import (
    SCALES,
    VALUES,
    ZERO_POINTS,
    Grid,
    Parts,
    Shape,
    nearest_points,
    not_zero,
    pack_pairs,
    slices,
)

if TYPE_CHECKING:
    import torch


# The greatest number below a half: adding it and cutting off rounds halves up, as C's roundf does above 0.
_HALF = float(np.nextafter(np.float32(0.5), np.float32(0)))


@dataclass(frozen=True)
class BlockNBits:
    """Blocks along in_features as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them.

    What comes out is, bit for bit, what ONNX Runtime's own quantiser (`MlasQuantizeBlockwise`) makes of a matrix, but
    for codes beyond an odd in_features, which are 0. That one wants it transposed in fp32, and holds Python's lock.

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

    @property
    def axis(self) -> int:
        """Rows stay rows."""
        return 0

    def parts(self, shape: Shape) -> Parts:
        """Values uint8 [out, blocks, bytes], scales [out, blocks], zero points uint8 [out, bytes]."""
        out, width = shape
        blocks = -(-width // self.block)
        parts: Parts = {
            VALUES: ("UINT8", (out, blocks, self.block * self.bits // 8)),
            SCALES: (None, (out, blocks)),
        }
        if not self.symmetric:
            parts[ZERO_POINTS] = ("UINT8", (out, -(-blocks * self.bits // 8)))
        return parts

    def apply(self, matrix: torch.Tensor) -> dict[str, NDArray[Any]]:
        """Round slices of rows, whose blocks do not depend on each other."""
        import torch

        (out, width), blocks = matrix.shape, -(-matrix.shape[1] // self.block)
        per_byte, middle = 8 // self.bits, 1 << self.bits - 1
        found = {
            name: np.empty(shape, np.float32 if name == SCALES else np.uint8)
            for name, (_, shape) in self.parts((out, width)).items()
        }
        for rows, part in slices(matrix):
            filled = torch.nn.functional.pad(part, (0, blocks * self.block - width)) if width % self.block else part
            codes, scales, zeros = self._rounded(filled.view(-1, blocks, self.block))
            flat = codes.view(-1, blocks * self.block)
            flat[:, width:] = 0
            found[VALUES][rows] = self._bytes(flat).view(-1, blocks, self.block * self.bits // 8).numpy()
            found[SCALES][rows] = scales.numpy()
            if zeros is not None:
                zeros = torch.nn.functional.pad(zeros, (0, blocks % per_byte), value=middle)
                found[ZERO_POINTS][rows] = self._bytes(zeros.to(torch.uint8)).numpy()
        return found

    def _rounded(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes uint8 [out, blocks, block] of float32 numbers, scales and, unless symmetric, zeros [out, blocks].

        Unlike `Grid.codes` this multiplies with the reciprocal and rounds halves up, as ONNX Runtime does.
        """
        import torch

        top, middle = (1 << self.bits) - 1, float(1 << self.bits - 1)
        least, most = numbers.amin(2), numbers.amax(2)
        zeros = None
        if self.symmetric:
            scales = torch.where(most.abs() > least.abs(), most, least) / -middle
        else:
            least, most = least.clamp_(max=0), most.clamp_(min=0)
            scales = (most - least) / top
            zeros = torch.where(scales != 0, 0 - least / scales, 0).clamp_(0, top).add_(_HALF).trunc_()
        factors = torch.where(scales != 0, scales.reciprocal(), 0)
        places = numbers * factors[..., None]
        places += middle if zeros is None else zeros[..., None]
        whole = places.clamp_(0, top).add_(_HALF).to(torch.int32)  # what is no number becomes 0, of its lowest byte
        return torch.from_numpy(whole.numpy().astype(np.uint8)), scales, zeros  # torch's cast takes thrice as long

    def grid(self, block: torch.Tensor) -> Grid:
        """From the least to the most number, 0 between them; symmetric: the larger magnitude is code 0, the lowest."""
        import torch

        top, middle = (1 << self.bits) - 1, float(1 << self.bits - 1)
        least, most = block.amin(1, keepdim=True).clamp(max=0), block.amax(1, keepdim=True).clamp(min=0)
        if self.symmetric:
            scale = not_zero(torch.where(-least > most, least, most) / -middle)
            return Grid(scale, torch.full_like(scale, middle), top)
        scale = not_zero((most - least) / top)
        return Grid(scale, (-least / scale).round().clamp(0, top), top)

    def nearest(self, matrix: torch.Tensor) -> torch.Tensor:
        """By `grid`."""
        return nearest_points(self, matrix)

    def pack(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, NDArray[Any]]:
        """As `parts` has them, the last block filled up with codes of 0."""
        import torch

        (out, blocks), width = scales.shape, codes.shape[1]
        filled = torch.nn.functional.pad(codes, (0, blocks * self.block - width)).to(torch.uint8)
        found = {VALUES: self._bytes(filled).view(out, blocks, -1).numpy(), SCALES: scales.numpy()}
        if not self.symmetric:
            found[ZERO_POINTS] = self._bytes(zeros.to(torch.uint8)).numpy()
        return found

    def _bytes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [out, n], contiguous, in bytes, of 4 bits the lower half first."""
        import torch

        if self.bits == 8:
            return codes
        if codes.shape[1] % 2:
            codes = torch.nn.functional.pad(codes, (0, 1))
        return pack_pairs(codes)
