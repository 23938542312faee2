"""Which rows run together, by contract. What a batch costs is that its weights are read once more."""

import numpy as np
import pytest

from runtime.errors import UserError
from runtime.steps import CONTRACTS, GraphContract, IndexContract, Limits, MaskContract, Step

VOCAB = 100


def step_of(lengths: list[int], past: list[int], slots: list[int], keep: int = 1) -> Step:
    tokens = np.ones((len(lengths), max(lengths)), np.int64)
    limits = Limits(slots=8, capacity=64, vocab_size=VOCAB, max_length=64)
    return limits.checked(tokens, np.array(lengths), np.array(past), np.array(slots), keep)


def batches(contract: GraphContract, *step: list[int], capacity: int = 64) -> list[tuple[int, int]]:
    return [(rows.start, rows.stop) for rows in contract.split(step_of(*step), capacity)]


def test_a_mask_runs_in_as_few_batches_as_its_kernel_allows() -> None:
    mask = MaskContract()
    assert batches(mask, [3, 2, 5], [0, 0, 0], [0, 1, 2]) == [(0, 3)]
    assert batches(mask, [1, 1, 1], [4, 0, 9], [1, 2, 3]) == [(0, 3)]
    assert batches(mask, [1, 1, 1], [4, 4, 4], [0, 2, 3]) == [(0, 1), (1, 3)]
    assert batches(mask, [2, 2], [3, 3], [0, 1]) == [(0, 1), (1, 2)]
    assert batches(mask, [1, 1, 4, 1], [3, 3, 0, 0], [0, 1, 2, 3]) == [(0, 2), (2, 4)]
    assert batches(mask, [1], [5], [2]) == [(0, 1)]


def test_with_indices_only_a_gap_between_slots_or_the_end_of_the_capacity_separates_rows() -> None:
    indices = IndexContract()
    assert batches(indices, [2, 5], [3, 9], [0, 1]) == [(0, 2)]
    assert batches(indices, [1, 1, 1], [4, 4, 4], [0, 2, 3]) == [(0, 1), (1, 3)]
    assert batches(indices, [1, 9], [46, 3], [0, 1], capacity=48) == [(0, 1), (1, 2)]
    assert batches(indices, [2, 9], [39, 3], [0, 1], capacity=48) == [(0, 2)]
    assert batches(indices, [2, 9], [40, 3], [0, 1], capacity=48) == [(0, 1), (1, 2)]


def test_the_columns_of_wanted_logits_are_each_rows_last_real_ones() -> None:
    feeds = IndexContract().feeds(step_of([5, 2], [7, 0], [0, 1], keep=3))
    assert feeds["logits_indices"].tolist() == [[2, 3, 4], [0, 0, 1]]
    assert feeds["write_indices"].tolist() == [7, 0]


def test_rows_that_run_apart_leave_the_others_padding_behind() -> None:
    step = step_of([1, 9], [46, 3], [0, 1])
    assert [step.rows(rows).tokens.shape for rows in IndexContract().split(step, 48)] == [(1, 1), (1, 9)]


def test_every_array_a_graph_reads_is_contiguous() -> None:
    """ONNX Runtime and CUDA are given addresses: strides would be misread."""
    step = step_of([5, 2, 4], [0, 0, 0], [0, 1, 2]).rows(slice(1, 3))
    for contract in CONTRACTS.values():
        assert all(array.flags.c_contiguous and array.dtype == np.int64 for array in contract.feeds(step).values())


def test_a_write_past_the_capacity_is_refused_and_names_the_row() -> None:
    """TensorRT drops such a write in silence."""
    with pytest.raises(UserError, match="row 1: 60 cached and 5 new tokens pass the capacity of 64"):
        step_of([5, 5], [0, 60], [0, 1])
