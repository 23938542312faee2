"""The search for factors: what it loses, and that the size of a checkpoint's channels has no say in what it finds."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exporter.rounding import BlockInt4, BlockNBits, ChannelFp8, Rounding
from exporter.scale_search import search

ROUNDINGS: list[Rounding] = [BlockNBits(4, 32, False), BlockNBits(4, 32, True), BlockInt4(64), ChannelFp8()]
WIDTH, HEADS, KV_HEADS = 64, 4, 2


def product(seed: int, outlier: float = 30.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two matrices, and inputs of which a few channels are far larger than the others."""
    torch.manual_seed(seed)
    first, second = torch.randn(48, WIDTH), torch.randn(16, WIDTH) * 3
    inputs = torch.randn(600, WIDTH) @ torch.randn(WIDTH, WIDTH) / WIDTH**0.5
    inputs[:, ::13] *= outlier
    return first, second, inputs


def lost(matrix: torch.Tensor, rounding: Rounding, inputs: torch.Tensor, factor: torch.Tensor) -> float:
    """The mean square of what products are off by, in fp64."""
    rounded = rounding.nearest(matrix * factor).double() / factor
    return float(((inputs.double() @ (rounded - matrix).T) ** 2).mean())


@pytest.mark.parametrize("rounding", ROUNDINGS[:3], ids=str)
def test_products_of_channels_of_unequal_size_lose_less(rounding: Rounding) -> None:
    first, second, inputs = product(0)
    found = search([(first, rounding), (second, rounding)], inputs)
    assert found.shape == (WIDTH,)
    assert bool((found > 0).all())
    for matrix in (first, second):
        assert lost(matrix, rounding, inputs, found) < 0.6 * lost(matrix, rounding, inputs, torch.ones(WIDTH))


exponents = st.lists(st.integers(-12, 12), min_size=WIDTH, max_size=WIDTH)


@settings(max_examples=25, deadline=None)
@given(exponents=exponents, seed=st.integers(0, 5), rounding=st.sampled_from(ROUNDINGS))
def test_whatever_size_a_checkpoint_gives_its_channels_the_scaled_matrix_is_the_same(
    exponents: list[int], seed: int, rounding: Rounding
) -> None:
    first, second, inputs = product(seed)
    sizes = torch.tensor(exponents).float().exp2()
    found = search([(first, rounding), (second, rounding)], inputs)
    other = search([(first * sizes, rounding), (second * sizes, rounding)], inputs / sizes)
    assert_same_but_for_a_power_of_two(other * sizes, found)


@settings(max_examples=25, deadline=None)
@given(exponents=exponents, power=st.integers(-20, 20))
def test_nor_has_the_size_of_a_matrix_a_say(exponents: list[int], power: int) -> None:
    """A matrix of large numbers must not count more: what it gives is scaled with it."""
    first, second, inputs = product(1)
    rounding = BlockNBits(4, 32, False)
    found = search([(first, rounding), (second, rounding)], inputs)
    other = search([(first * 2.0**power, rounding), (second, rounding)], inputs)
    assert torch.equal(other, found)


@settings(max_examples=25, deadline=None)
@given(exponents=st.lists(st.integers(-12, 12), min_size=32, max_size=32), seed=st.integers(0, 5))
def test_the_same_goes_for_channels_that_query_heads_share(exponents: list[int], seed: int) -> None:
    matrix, _, inputs = product(seed)
    rounding = BlockNBits(4, 32, False)

    def pool(channels: torch.Tensor) -> torch.Tensor:
        return channels.reshape(KV_HEADS, HEADS // KV_HEADS, -1).mean(1).flatten()

    def spread(factors: torch.Tensor) -> torch.Tensor:
        return factors.reshape(KV_HEADS, -1).repeat_interleave(HEADS // KV_HEADS, 0).flatten()

    sizes = torch.tensor(exponents).float().exp2()
    look = partial(search, pool=pool, spread=spread)
    found = look([(matrix, rounding)], inputs)
    assert found.shape == (WIDTH * KV_HEADS // HEADS,)
    other = look([(matrix * spread(sizes), rounding)], inputs / spread(sizes))
    assert_same_but_for_a_power_of_two(other * sizes, found)


def assert_same_but_for_a_power_of_two(other: torch.Tensor, found: torch.Tensor) -> None:
    """One for the whole matrix, which moves every scale of a grid and no code."""
    ratio = (other / found).log2()
    assert torch.equal(ratio, ratio[0].round().expand_as(ratio))


@pytest.mark.parametrize("silent", [slice(0, 1), slice(0, 40), slice(None)])
def test_channels_that_the_text_does_not_reach_get_a_factor_that_is_finite(silent: slice) -> None:
    first, _, inputs = product(0)
    inputs[:, silent] = 0
    rounding = BlockNBits(4, 32, False)
    found = search([(first, rounding)], inputs)
    assert bool(torch.isfinite(found).all())
    assert bool((found > 0).all())
    if silent != slice(None):  # and it has no larger a part of its block than the others, and no smaller
        live = torch.ones(WIDTH, dtype=torch.bool)
        live[silent] = False
        sizes = (first * found).square().mean(0)
        assert bool((sizes[silent] <= sizes[live].max() * 1.001).all())
        assert bool((sizes[silent] >= sizes[live].min() * 0.999).all())


@pytest.mark.parametrize("unread", [slice(0, 1), slice(None)])
def test_channels_that_no_matrix_reads_get_a_factor_that_is_finite(unread: slice) -> None:
    first, _, inputs = product(0)
    first[:, unread] = 0
    found = search([(first, BlockNBits(4, 32, True))], inputs)
    assert bool(torch.isfinite(found).all())
    assert bool((found > 0).all())
