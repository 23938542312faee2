"""GPTQ: each column of a matrix is rounded in turn, and what it is off by is made up for in those that follow.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022, algorithm 1,
with the grid of a block taken when its first column is reached, and columns in their own order. What the layers before
are off by is made up for ahead of that, by the matrix that gives nearest to what it was meant to give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from numpy.typing import NDArray

from exporter.rounding import BlockRounding

DAMPING = 0.03  # of the mean square of the inputs, added to each one's
WIDTH = 16384  # columns that make up for each other: what a Gram matrix may take, 1 GiB in fp32
MADE_UP = 0.5  # of what the layers before are off by: the whole of it follows the calibration text too closely

Tensor = torch.Tensor


@dataclass(frozen=True)
class Run:
    """What a run of columns multiplies.

    Attributes:
        columns: which.
        inverse: the upper Cholesky factor of the inverse of the inputs' damped Gram matrix, float32 [n, n].
        shift: the mean product of what the inputs are off by and the inputs, float32 [n, n].
    """

    columns: slice
    inverse: Tensor
    shift: Tensor


def runs_of(exact: Tensor, read: Tensor, factor: Tensor | None = None) -> list[Run]:
    """The runs of a matrix's columns, shared by all matrices that read these inputs.

    Args:
        exact: what the matrix multiplies in the model as it is, float32 [tokens, in_features].
        read: what it multiplies once what is before it is rounded.
        factor: what the matrix's columns have been multiplied with [in_features], and the inputs divided by.
    """
    runs = []
    for start in range(0, read.shape[1], WIDTH):
        columns = slice(start, min(start + WIDTH, read.shape[1]))
        scale = torch.ones(()) if factor is None else factor[columns, None] * factor[columns]
        part = read[:, columns]
        gram = part.T @ part / len(part) / scale
        shift = (exact[:, columns] - part).T @ part / len(part) / scale
        diagonal = gram.diagonal()
        diagonal += max(DAMPING * float(diagonal.mean()), torch.finfo(torch.float32).tiny)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        runs.append(Run(columns, torch.linalg.cholesky(inverse, upper=True), shift))
    return runs


def make_up(matrix: Tensor, runs: list[Run]) -> None:
    """Change a matrix, float32 [out_features, in_features], so that it makes up for what its inputs are off by."""
    for run in runs:
        part = matrix[:, run.columns]
        part += MADE_UP * (part @ run.shift) @ run.inverse.T @ run.inverse


@dataclass(frozen=True)
class Coded:
    """Codes uint8 [out, in] of a matrix's rows, and scales and zeros of their blocks, float32 [out, blocks]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def joined(cls, pieces: Sequence[Self]) -> Self:
        """Rows under rows."""
        sides = ((piece.codes, piece.scales, piece.zeros) for piece in pieces)
        return cls(*(torch.cat(side) for side in zip(*sides, strict=True)))

    def pack(self, rounding: BlockRounding) -> dict[str, NDArray[Any]]:
        """The parts, as `Rounding.apply` gives them."""
        return rounding.pack(self.codes, self.scales, self.zeros)


def gptq(matrix: Tensor, runs: list[Run], rounding: BlockRounding) -> Coded:
    """Round a matrix, or some of its rows, which do not depend on each other.

    Args:
        matrix: float32 [out_features, in_features]; it is overwritten with the numbers that it is rounded to.
        runs: by `runs_of`.
        rounding: whose grids.
    """
    out, width = matrix.shape
    codes = torch.empty(out, width, dtype=torch.uint8)
    blocks = -(-width // rounding.block)
    scales, zeros = torch.empty(out, blocks), torch.empty(out, blocks)
    for run in runs:
        start, end = run.columns.start, run.columns.stop
        for first in range(start, end, rounding.block):
            block = matrix[:, first : min(first + rounding.block, end)]
            grid = rounding.grid(block)
            index, count = first // rounding.block, block.shape[1]
            scales[:, index], zeros[:, index] = grid.scale[:, 0], grid.zero[:, 0]
            here = slice(first - start, first - start + count)
            errors = torch.empty_like(block)
            for column in range(count):
                row = run.inverse[here.start + column]
                chosen = grid.codes(block[:, column : column + 1])
                codes[:, first + column] = chosen[:, 0].to(torch.uint8)
                number = grid.numbers(chosen)
                errors[:, column] = ((block[:, column : column + 1] - number) / row[here.start + column])[:, 0]
                block[:, column + 1 :] -= errors[:, column, None] * row[here.start + column + 1 : here.stop]
                block[:, column] = number[:, 0]
            matrix[:, first + count : end] -= errors @ run.inverse[here, here.stop :]
    return Coded(codes, scales, zeros)
