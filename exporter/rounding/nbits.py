"""Weights of 8 and 4 bits as ONNX Runtime's MatMulNBits and GatherBlockQuantized read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporter.rounding.base import SCALES, VALUES, ZERO_POINTS, Grid, Parts, Shape, nearest_points, not_zero, slices
from runtime.ort_model import import_onnxruntime

if TYPE_CHECKING:
    import torch


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
            VALUES: ("UINT8", (out, blocks, self.block * self.bits // 8)),
            SCALES: (None, (out, blocks)),
        }
        if not self.symmetric:
            parts[ZERO_POINTS] = ("UINT8", (out, -(-blocks * self.bits // 8)))
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
        for rows, part in slices(matrix):
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
