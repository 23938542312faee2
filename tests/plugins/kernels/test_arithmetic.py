"""What the kernels compute, by Triton's interpreter: attention, for every head width, group and length of a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import Interpreter, interpreter
from split_cases import Case

from plugins.kernels.shape import MERGE_CONFIGS, SPLIT_CONFIGS, MergeConfig, SplitConfig
from plugins.split_reference import split_attention

SMALL = SplitConfig(16, 32, 4, 2)
MERGE = MergeConfig(4, 1)
FLOATS = ("float32", "float16", "bfloat16")
CONFIGS = [(width, config) for width, configs in SPLIT_CONFIGS.items() for config in configs]


@pytest.fixture(scope="module")
def kernels() -> Iterator[Interpreter]:
    with interpreter() as running:
        yield running


def check(
    kernels: Interpreter, case: Case, dtype: str = "float32", split: SplitConfig = SMALL, merge: MergeConfig = MERGE
) -> None:
    """The kernels' context is a softmax's, and their partials are the reference's where those are defined."""
    exact = dtype == "float32"
    numpy_type = np.dtype(dtype)
    partials = kernels.split(case, split, dtype)
    expected = case.expected(numpy_type)
    last_place = float(np.spacing(np.array(np.abs(expected).max(), numpy_type)))
    context = kernels.merge(case, partials, merge, dtype)
    np.testing.assert_allclose(context, expected, rtol=0, atol=1e-5 if exact else 2 * last_place)

    meant = split_attention(*case.inputs(numpy_type), heads=case.heads, kv_heads=case.kv_heads, scale=case.scale)
    relative = 1e-5 if exact else 2 * float(ml_dtypes.finfo(numpy_type).eps)
    for ours, theirs in zip(partials, meant, strict=True):
        defined = ~np.isnan(theirs)
        np.testing.assert_allclose(ours[defined], theirs[defined], rtol=0, atol=relative * np.nanmax(np.abs(theirs)))


@st.composite
def cases(draw: st.DrawFn, longest: int, tokens: tuple[int, ...]) -> Case:
    """MHA, GQA and MQA, every head width, rotation of a quarter to all of it, unequal rows that may be full."""
    width = draw(st.sampled_from([64, 96, 128, 192]))
    rotary = 2 * round(width * draw(st.floats(0.25, 1)) / 2)
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (1, 12)]))
    sequence = draw(st.sampled_from(tokens))
    capacity = sequence + draw(st.integers(0, longest - sequence))
    lengths = draw(st.lists(st.integers(sequence, capacity), min_size=1, max_size=2))
    seed = draw(st.integers(0, 2**32 - 1))
    return Case(kv_heads * group, kv_heads, width, rotary, tuple(lengths), sequence, capacity, seed)


# The interpreter takes milliseconds for what a GPU does in none: few examples here, many where slow tests run.
@settings(max_examples=8, deadline=None)
@given(case=cases(300, tokens=(1, 2, 5)), dtype=st.sampled_from(FLOATS))
def test_any_shape_gets_the_attention_that_it_means(kernels: Interpreter, case: Case, dtype: str) -> None:
    check(kernels, case, dtype)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=150, deadline=None)
@given(
    case=cases(800, tokens=(1, 3, 17, 60)),
    dtype=st.sampled_from(FLOATS),
    split=st.sampled_from([config for _, config in CONFIGS]),
    merge=st.sampled_from(MERGE_CONFIGS),
)
def test_many_shapes_get_the_attention_that_they_mean(
    kernels: Interpreter, case: Case, dtype: str, split: SplitConfig, merge: MergeConfig
) -> None:
    check(kernels, case, dtype, split, merge)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 2, 64, 32, lengths=(1, 320), sequence=1, capacity=320),
        Case(3, 1, 64, 16, lengths=(90, 70), sequence=7, capacity=100),
        Case(2, 2, 96, 48, lengths=(34,), sequence=34, capacity=34),
        Case(12, 1, 192, 96, lengths=(64, 65), sequence=1, capacity=128),
    ],
    ids=["first token and last free position", "chunk", "prefill that fills the cache", "either side of a block"],
)
def test_steps_of_every_kind(kernels: Interpreter, case: Case, dtype: str) -> None:
    check(kernels, case, dtype)


@pytest.mark.parametrize(("width", "config"), CONFIGS, ids=str)
def test_every_block_size_that_is_shipped(kernels: Interpreter, width: int, config: SplitConfig) -> None:
    check(kernels, Case(3, 1, width, width // 2, lengths=(150,), sequence=3, capacity=160), "float16", config)


@pytest.mark.parametrize("merge", MERGE_CONFIGS, ids=str)
def test_more_blocks_than_are_merged_at_once(kernels: Interpreter, merge: MergeConfig) -> None:
    check(kernels, Case(1, 1, 64, 32, lengths=(1290,), sequence=1, capacity=1300), merge=merge)


def test_blocks_of_several_granules(kernels: Interpreter) -> None:
    check(kernels, Case(1, 1, 64, 32, lengths=(390, 17), sequence=16, capacity=400))


def test_blocks_past_a_rows_length_are_neither_read_nor_written(kernels: Interpreter) -> None:
    """Else a step's time follows the capacity, or what an earlier request left in the cache is seen."""
    case = Case(2, 1, 64, 32, lengths=(65, 200), sequence=1, capacity=2000)
    partials = kernels.split(case, SMALL)  # NaN lies in the cache past each row's length
    written = ~np.isnan(partials[0][:, 0, 0])
    assert [int(row.sum()) for row in written] == [2, 4]
    assert all(row[:count].all() for row, count in zip(written, (2, 4), strict=True))
    poisoned = tuple(np.where(np.isnan(partial), np.float32(1e30), partial) for partial in partials)
    np.testing.assert_array_equal(kernels.merge(case, poisoned, MERGE), kernels.merge(case, partials, MERGE))


def test_scores_so_great_that_their_exponentials_overflow_still_give_a_context(kernels: Interpreter) -> None:
    check(kernels, replace(Case(2, 1, 64, 32, lengths=(130,), sequence=2, capacity=192), queries=100.0), "float16")


def test_lengths_that_no_step_leaves_are_taken_as_the_nearest_that_one_does(kernels: Interpreter) -> None:
    """TensorRT fills inputs at random while it times kernels: what they say must not lead outside the cache."""
    case = Case(2, 1, 64, 32, lengths=(5, 5, 60), sequence=5, capacity=60)
    astray = replace(case, told=(0, -(2**31), 2**31 - 1))
    for ours, theirs in zip(kernels.split(astray, SMALL), kernels.split(case, SMALL), strict=True):
        np.testing.assert_array_equal(ours, theirs)
