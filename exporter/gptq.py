"""GPTQ: each column of a matrix is rounded in turn, and what it is off by is made up for in those that follow.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022, algorithm 1,
with the grid of a block taken when its first column is reached, and columns in their own order.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from exporter.rounding import BlockRounding

DAMPING = 0.03  # of the mean square of the inputs, added to each one's
WIDTH = 16384  # columns that make up for each other: what a Gram matrix may take, 1 GiB in fp32

Tensor = torch.Tensor


def inverse_factors(inputs: Tensor, columns: Tensor | None = None) -> list[Tensor]:
    """The upper Cholesky factor of the inverse of each run of `WIDTH` columns' Gram matrix, damped.

    Args:
        inputs: what the matrix multiplies, float32 [tokens, in_features].
        columns: factors [in_features] that the matrix's columns have been given, and the inputs the inverse of.

    Returns:
        float32 [n, n] for each run of n columns; shared by all matrices that read these inputs.
    """
    factors = []
    for start in range(0, inputs.shape[1], WIDTH):
        part = inputs[:, start : start + WIDTH]
        gram = part.T @ part / len(part)
        if columns is not None:
            factor = columns[start : start + WIDTH]
            gram /= factor[:, None] * factor
        diagonal = gram.diagonal()
        diagonal += max(DAMPING * float(diagonal.mean()), torch.finfo(torch.float32).tiny)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        factors.append(torch.linalg.cholesky(inverse, upper=True))
    return factors


def gptq(matrix: Tensor, factors: list[Tensor], rounding: BlockRounding) -> dict[str, NDArray[Any]]:
    """Round a matrix.

    Args:
        matrix: float32 [out_features, in_features]; it is overwritten.
        factors: by `inverse_factors`, of the inputs that it multiplies.
        rounding: whose grids and form.

    Returns:
        The parts, as `Rounding.apply` gives them.
    """
    out, width = matrix.shape
    codes = torch.empty(out, width, dtype=torch.uint8)
    blocks = -(-width // rounding.block)
    scales, zeros = torch.empty(out, blocks), torch.empty(out, blocks)
    for run, factor in enumerate(factors):
        start, end = run * WIDTH, min((run + 1) * WIDTH, width)
        for first in range(start, end, rounding.block):
            block = matrix[:, first : first + rounding.block]
            grid = rounding.grid(block)
            index = first // rounding.block
            scales[:, index], zeros[:, index] = grid.scale[:, 0], grid.zero[:, 0]
            here = slice(first - start, first - start + block.shape[1])
            errors = torch.empty_like(block)
            for column in range(block.shape[1]):
                row = factor[here.start + column]
                exact = block[:, column : column + 1]
                chosen = grid.codes(exact)
                codes[:, first + column] = chosen[:, 0].to(torch.uint8)
                errors[:, column] = ((exact - grid.numbers(chosen)) / row[here.start + column])[:, 0]
                block[:, column:] -= errors[:, column, None] * row[here.start + column : here.stop]
            matrix[:, first + block.shape[1] : end] -= errors @ factor[here, here.stop :]
    return rounding.pack(codes, scales, zeros)
