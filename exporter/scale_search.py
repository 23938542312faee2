"""Activation-aware scaling: which channels of a product shall have how much of its grid.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023, give a channel the
factor a^α of its activations' size a. Here the norm of the scaled column is (a·b)^α, b that of the column as it is: a
and b change inversely where a checkpoint's channels are scaled, so that what comes out does not depend on how they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from exporter.rounding import Rounding

ALPHAS = (0.0, 0.15, 0.3, 0.45, 0.6)  # beyond, columns of large activations take the whole grid of their block
SAMPLE = 512  # tokens by whose products a choice is judged
ROWS = 4096  # of a matrix, likewise

Tensor = torch.Tensor


def search(
    matrices: Sequence[tuple[Tensor, Rounding]],
    inputs: Tensor,
    pool: Callable[[Tensor], Tensor] = lambda x: x,
    spread: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """The factors that lose least when the matrices are rounded to the nearest point.

    Args:
        matrices: those that read the channels [out_features, in_features], and how each will be rounded.
        inputs: what they multiply, float32 [tokens, in_features].
        pool: means over the channels that have one factor, [in_features] → [factors].
        spread: a factor for each channel, [factors] → [in_features].

    Returns:
        float32 [factors], above 0.
    """
    sample = inputs[:: max(1, len(inputs) // SAMPLE)]
    # By what each gives, which no factor changes: a matrix counts the same whatever its channels' scale.
    rows = ((matrix[:: -(-len(matrix) // ROWS)].float(), rounding) for matrix, rounding in matrices)
    matrices = [(matrix / _size(sample @ matrix.T), rounding) for matrix, rounding in rows]
    squares = torch.linalg.vector_norm(inputs, dim=0).square() / len(inputs)  # no copy of the inputs
    activation = pool(squares).sqrt()
    column = pool(torch.stack([matrix.square().mean(0) for matrix, _ in matrices]).mean(0)).sqrt()
    product = activation * column
    live = product > 0
    # A channel that the text does not reach is one like the others, one that is not read stays as it is.
    product = torch.where(live, product, product[live].median() if bool(live.any()) else 1.0)
    column = torch.where(column > 0, column, 1.0)
    best, least = torch.ones_like(column), float("inf")
    for alpha in ALPHAS:
        factor = product**alpha / column
        factor = factor / factor.log2().mean().round().exp2()  # centred, by a power of two: exact
        loss = sum(_loss(matrix, rounding, spread(factor), sample) for matrix, rounding in matrices)
        if loss < least:
            best, least = factor, loss
    return best


def _size(given: Tensor) -> float:
    """The root of the mean square, as a power of two, which scales exactly; 1 of nothing."""
    size = float(given.square().mean().sqrt())
    return float(2.0 ** round(math.log2(size))) if size > 0 else 1.0


def _loss(matrix: Tensor, rounding: Rounding, factor: Tensor, sample: Tensor) -> float:
    error = rounding.nearest(matrix * factor) / factor - matrix
    return float((sample @ error.T).square().sum(dtype=torch.float64))
