"""GPTQ: codes chosen by what they multiply must give better products than the nearest ones, in the same form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from exporter import gptq as module
from exporter.evaluate.onnx_quantized import dequantized, from_blocks
from exporter.gptq import gptq, make_up, runs_of
from exporter.rounding import SCALES, VALUES, ZERO_POINTS, BlockInt4, BlockNBits, BlockRounding

BLOCKS: list[BlockRounding] = [
    *(BlockNBits(4, block, symmetric) for block in (32, 64, 128) for symmetric in (True, False)),
    BlockNBits(8, 32, False),
    BlockInt4(64),
    BlockInt4(128),
]


def product(out: int = 40, width: int = 256, tokens: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix, and inputs that go together, as those of models do."""
    torch.manual_seed(0)
    mixing = torch.randn(width, width) / width**0.5 + torch.randn(width, 1) @ torch.randn(1, width) / width**0.5
    return torch.randn(out, width), torch.randn(tokens, width) @ mixing


def rounded(matrix: torch.Tensor, inputs: torch.Tensor, rounding: BlockRounding) -> torch.Tensor:
    """What the parts of GPTQ stand for, float32 [out, in]."""
    return numbers(gptq(matrix.clone(), runs_of(inputs, inputs), rounding).pack(rounding), rounding, matrix.shape[1])


def numbers(parts: dict[str, NDArray[Any]], rounding: BlockRounding, width: int) -> torch.Tensor:
    """As the target's operator reads them."""
    scales = torch.from_numpy(parts[SCALES])
    if isinstance(rounding, BlockNBits):
        points = torch.from_numpy(parts[ZERO_POINTS]) if ZERO_POINTS in parts else None
        blocks = from_blocks(torch.from_numpy(parts[VALUES]), scales, points, rounding.bits, rounding.block)
        return blocks[:, :width]
    packed = torch.from_numpy(parts[VALUES])
    values = torch.stack([packed & 15, packed >> 4], -1).reshape(width, -1).to(torch.int8)
    return dequantized(torch.where(values > 7, values - 16, values), scales, 0, rounding.block).T


def lost(matrix: torch.Tensor, other: torch.Tensor, inputs: torch.Tensor) -> float:
    return float((inputs.double() @ (matrix - other).double().T).square().mean())


@pytest.mark.parametrize("rounding", BLOCKS, ids=str)
def test_products_lose_less_than_by_the_nearest_point(rounding: BlockRounding) -> None:
    matrix, inputs = product()
    found = rounded(matrix, inputs, rounding)
    for nearest in (rounding.nearest(matrix), numbers(rounding.apply(matrix), rounding, 256)):
        assert lost(matrix, found, inputs) < 0.6 * lost(matrix, nearest, inputs)
    apart = (found - matrix).abs().amax() / (rounding.nearest(matrix) - matrix).abs().amax()
    assert apart < 8  # columns make up for each other, and stay near what they were


@pytest.mark.parametrize("rounding", BLOCKS, ids=str)
def test_the_parts_have_the_form_that_the_graph_declares(rounding: BlockRounding) -> None:
    matrix, inputs = product(5)  # of an odd number of rows
    parts, nearest = gptq(matrix.clone(), runs_of(inputs, inputs), rounding).pack(rounding), rounding.apply(matrix)
    assert {name: (array.shape, array.dtype) for name, array in parts.items()} == {
        name: (array.shape, array.dtype) for name, array in nearest.items()
    }


@pytest.mark.parametrize("width", [33, 80, 95, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_last_block_that_is_not_whole_is_filled_up(width: int, symmetric: bool) -> None:
    matrix, inputs = product(width=width)
    rounding = BlockNBits(4, 32, symmetric)
    parts = gptq(matrix.clone(), runs_of(inputs, inputs), rounding).pack(rounding)
    assert {name: array.shape for name, array in parts.items()} == {
        name: shape for name, (_, shape) in rounding.parts(tuple(matrix.shape)).items()
    }
    found = numbers(parts, rounding, width)
    assert lost(matrix, found, inputs) < lost(matrix, rounding.nearest(matrix), inputs)


@pytest.mark.parametrize("most", [64, 128, 192])
def test_matrices_wider_than_a_gram_matrix_may_be_are_rounded_in_runs(most: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "WIDTH", most)
    matrix, inputs = product()
    rounding = BlockNBits(4, 64, False)
    shapes = [tuple(run.inverse.shape) for run in runs_of(inputs, inputs)]
    assert shapes == [(min(most, 256 - start),) * 2 for start in range(0, 256, most)]
    found = rounded(matrix, inputs, rounding)
    assert lost(matrix, found, inputs) < 0.8 * lost(matrix, rounding.nearest(matrix), inputs)
    for start in range(0, 256, most):  # each run by itself, as if the others were not there
        alone = rounded(matrix[:, start : start + most], inputs[:, start : start + most], rounding)
        assert torch.equal(found[:, start : start + most], alone)


@pytest.mark.parametrize("rounding", [BlockNBits(4, 32, False), BlockNBits(4, 32, True), BlockInt4(64)], ids=str)
@pytest.mark.parametrize("dead", [slice(5, 6), slice(0, 70), slice(None)])
def test_channels_that_the_text_never_reaches_stay_within_a_step(rounding: BlockRounding, dead: slice) -> None:
    matrix, inputs = product()
    inputs[:, dead] = 0
    found = rounded(matrix, inputs, rounding)
    assert bool(torch.isfinite(found).all())
    assert lost(matrix, found, inputs) <= lost(matrix, rounding.nearest(matrix), inputs)
    if dead == slice(None):
        assert torch.equal(found, rounding.nearest(matrix))
    step = matrix.abs().max() / 7
    assert bool(((found - matrix)[:, dead].abs() <= step).all())


def test_fewer_tokens_than_channels_are_enough() -> None:
    matrix, inputs = product(tokens=20)
    rounding = BlockNBits(4, 32, False)
    found = rounded(matrix, inputs, rounding)
    assert bool(torch.isfinite(found).all())
    assert lost(matrix, found, inputs) < 0.1 * lost(matrix, rounding.nearest(matrix), inputs)


@pytest.mark.parametrize("size", [2.0**-40, 2.0**40])
def test_the_size_of_inputs_has_no_say(size: float) -> None:
    matrix, inputs = product(8)
    rounding = BlockNBits(4, 32, False)
    assert torch.equal(rounded(matrix, inputs * size, rounding), rounded(matrix, inputs, rounding))


def test_rows_of_zeros_stay_so() -> None:
    matrix, inputs = product()
    matrix[3] = 0
    for rounding in (BlockNBits(4, 32, False), BlockNBits(4, 32, True), BlockInt4(64)):
        assert bool((rounded(matrix, inputs, rounding)[3] == 0).all())


def test_codes_are_those_of_columns_rounded_one_by_one_with_the_inverse_hessian() -> None:
    """Frantar et al., equations 2 and 3, in fp64 and one column at a time: no blocks, no Cholesky factors."""
    matrix, inputs = product(6, 64)
    rounding = BlockNBits(4, 64, False)
    gram = (inputs.double().T @ inputs.double() / len(inputs)).numpy()
    gram += np.eye(64) * module.DAMPING * np.diag(gram).mean()
    grid = rounding.grid(matrix)
    left, expected = matrix.double().numpy().copy(), np.zeros((6, 64))
    for column in range(64):
        inverse = np.linalg.inv(gram[column:, column:])
        code = grid.codes(torch.from_numpy(left[:, column : column + 1]).float())
        expected[:, column] = grid.numbers(code).double().numpy()[:, 0]
        error = (left[:, column] - expected[:, column]) / inverse[0, 0]
        left[:, column:] -= error[:, None] * inverse[0]
    found = rounded(matrix, inputs, rounding).double().numpy()
    assert (np.abs(found - expected) < 1e-5).mean() > 0.99  # fp32 decides a tie otherwise, and what follows it


@pytest.mark.parametrize("width", [256, 80])
@pytest.mark.parametrize("rounding", BLOCKS[:4], ids=str)
def test_the_matrix_is_left_as_the_numbers_that_it_was_rounded_to(rounding: BlockRounding, width: int) -> None:
    """Layers that follow are calibrated by what it gives."""
    matrix, inputs = product(width=width)
    parts = gptq(matrix, runs_of(inputs, inputs), rounding).pack(rounding)
    torch.testing.assert_close(matrix, numbers(parts, rounding, width), rtol=1e-6, atol=1e-7)


def off(inputs: torch.Tensor) -> torch.Tensor:
    """What a matrix reads once what is before it is rounded: a little smaller, and noisier."""
    return 0.95 * inputs + 0.05 * inputs.std() * torch.randn_like(inputs)


def test_what_the_layers_before_are_off_by_is_made_up_for() -> None:
    matrix, exact = product()
    read = off(exact)
    wanted = exact.double() @ matrix.double().T
    changed = matrix.clone()
    make_up(changed, runs_of(exact, read))
    before, after = ((wanted - read.double() @ other.double().T).square().mean() for other in (matrix, changed))
    assert after < 0.7 * before
    rounding = BlockNBits(4, 32, False)
    gptq(changed, runs_of(exact, read), rounding)
    alone = matrix.clone()
    gptq(alone, runs_of(exact, read), rounding)
    before, after = ((wanted - read.double() @ other.double().T).square().mean() for other in (alone, changed))
    assert after < before


def test_how_much_is_made_up_for_is_part_of_the_way_to_least_squares(monkeypatch: Any) -> None:
    """Ridge regression on what is left over, solved by numpy in fp64."""
    matrix, exact = product(6, 64)
    read = off(exact)
    x, gap = read.double().numpy(), (exact - read).double().numpy()
    gram = x.T @ x / len(x)
    gram += np.eye(64) * module.DAMPING * np.diag(gram).mean()
    expected = matrix.double().numpy() @ (gap.T @ x / len(x)) @ np.linalg.inv(gram)
    make_up(changed := matrix.clone(), runs_of(exact, read))
    np.testing.assert_allclose(
        (changed - matrix).numpy(), module.MADE_UP * expected, atol=1e-4 * np.abs(expected).max()
    )


def test_a_matrix_that_reads_what_it_should_has_nothing_to_make_up_for() -> None:
    matrix, inputs = product()
    make_up(changed := matrix.clone(), runs_of(inputs, inputs))
    assert torch.equal(changed, matrix)


def test_factors_of_columns_are_those_by_which_what_they_read_is_smaller() -> None:
    _, exact = product()
    read, factor = off(exact), 2.0 ** torch.randint(-8, 9, (256,)).float()
    for ours, divided in zip(runs_of(exact, read, factor), runs_of(exact / factor, read / factor), strict=True):
        assert torch.equal(ours.inverse, divided.inverse)
        assert torch.equal(ours.shift, divided.shift)
