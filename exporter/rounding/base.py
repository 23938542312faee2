"""Weights of few bits: how a matrix is rounded to the nearest point of a grid, and what the target's operator reads.

A rounding turns one matrix [out_features, in_features] into the initializers that stand for it, its parts. No row
depends on another, so that some rows of a matrix give their own rows, or columns, of every part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

VALUES, SCALES, ZERO_POINTS = "values", "scales", "zero_points"
BLOCKS = (32, 64, 128)
_NUMBERS = 1 << 20  # rounded at once: with fewer, threads wait for the interpreter; more leave the caches

Shape = tuple[int, ...]
Parts = dict[str, tuple[str | None, Shape]]


class Rounding(Protocol):
    """A grid, and the form in which a target's operator takes what was rounded to it."""

    @property
    def precision(self) -> str:
        """Its name, as in recipes."""
        ...

    @property
    def axis(self) -> int:
        """Of every part, the axis along which a matrix's rows go: 0, or −1."""
        ...

    def parts(self, shape: Shape) -> Parts:
        """Name, dtype as ONNX calls it (None: that of the activations) and shape of every part of a matrix [out, in].

        Raises:
            UserError: the operator cannot take a matrix of this shape.
        """
        ...

    def apply(self, matrix: torch.Tensor) -> dict[str, NDArray[Any]]:
        """Round a matrix [out, in], or some of its rows, of any float dtype.

        Every part comes as its bytes are stored, scales in float32.
        """
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


def nearest_points(rounding: BlockRounding, matrix: torch.Tensor) -> torch.Tensor:
    """`Rounding.nearest` by the grids of blocks."""
    import torch

    found = []
    for block in torch.split(matrix, rounding.block, 1):
        grid = rounding.grid(block)
        found.append(grid.numbers(grid.codes(block)))
    return torch.cat(found, 1)


def not_zero(scale: torch.Tensor) -> torch.Tensor:
    """Scales of blocks of zeros are of no matter, but not 0."""
    return scale.masked_fill(scale == 0, 1.0)


def slices(matrix: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of rows in fp32, an even number in each but the last."""
    count = max(2, _NUMBERS // max(1, matrix.shape[1]) // 2 * 2)
    for start in range(0, matrix.shape[0], count):
        rows = slice(start, min(start + count, matrix.shape[0]))
        yield rows, matrix[rows].float()


def pack_pairs(codes: torch.Tensor) -> torch.Tensor:
    """Codes below 16, uint8 [rows, n], contiguous and n even, two to a byte: the first is the lower half."""
    import torch

    pairs = codes.view(torch.int16)  # little-endian: the second code is the upper byte
    return pairs.bitwise_or(pairs >> 4).to(torch.uint8)
