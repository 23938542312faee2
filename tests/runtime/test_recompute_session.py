"""Text generation without a cache; the oracle is numpy on whole rows."""

from pathlib import Path

import numpy as np
import pytest
from corruptions import redescribe
from forward_bundles import BOS, MAX_LENGTH, VOCAB, Toy

from runtime import load
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.golden import Golden, GoldenStep, selftest
from runtime.recompute_session import RecomputeSession
from runtime.session import Session, open_session


@pytest.fixture(params=["onnxruntime", "tensorrt"])
def toy(request: pytest.FixtureRequest) -> Toy:
    return Toy("text-generation", target=request.param, positions=request.param == "tensorrt")


@pytest.fixture
def path(toy: Toy, tmp_path: Path) -> Path:
    return toy.write(tmp_path / "toy")


@pytest.fixture
def session(path: Path) -> Session:
    return open_session(path, slots=4, capacity=12)


def feed(session: Session, rows: list[list[int]], past: list[int], slots: list[int], keep: int = 1) -> np.ndarray:
    tokens = np.full((len(rows), max(map(len, rows))), -1)  # padding may be anything
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return session.step(tokens, np.array(list(map(len, rows))), np.array(past), np.array(slots), keep)


def test_prefill_chunk_and_decode_of_unequal_rows_are_those_of_whole_rows(session: Session, toy: Toy) -> None:
    assert isinstance(session, RecomputeSession)
    first, second = [BOS, 9, 5, 7], [BOS, 4]
    logits = feed(session, [first, second], [0, 0], [2, 0])
    np.testing.assert_allclose(logits[:, 0], [toy.logits(first)[-1], toy.logits(second)[-1]], atol=1e-5)
    logits = feed(session, [[8, 6, 10], [11]], [2, 4], [0, 2], keep=3)
    np.testing.assert_allclose(logits[0], toy.logits([*second, 8, 6, 10])[-3:], atol=1e-5)
    expected = toy.logits([*first, 11])[-1]  # a row of one new token repeats it
    np.testing.assert_allclose(logits[1], [expected] * 3, atol=1e-5)


def test_what_a_slot_held_before_is_overwritten(session: Session, toy: Toy) -> None:
    feed(session, [[BOS, 9, 5, 7]], [0], [1])
    logits = feed(session, [[8, 6]], [1], [1])
    np.testing.assert_allclose(logits[0, 0], toy.logits([BOS, 8, 6])[-1], atol=1e-5)


def test_reopened_sessions_share_weights_and_not_tokens(session: Session, toy: Toy) -> None:
    feed(session, [[BOS, 9, 5]], [0], [0])
    other = session.reopen(slots=1, capacity=5)
    assert (other.slots, other.capacity, session.slots) == (1, 5, 4)
    feed(other, [[BOS, 4, 4]], [0], [0])
    logits = feed(session, [[7]], [3], [0])
    np.testing.assert_allclose(logits[0, 0], toy.logits([BOS, 9, 5, 7])[-1], atol=1e-5)


def test_what_passes_the_capacity_or_the_vocabulary_is_refused(session: Session, path: Path) -> None:
    with pytest.raises(UserError, match="row 0: 10 cached and 3 new tokens pass the capacity of 12"):
        feed(session, [[5, 6, 7]], [10], [0])
    with pytest.raises(UserError, match=f"token id {VOCAB} is outside the vocabulary of {VOCAB}"):
        feed(session, [[VOCAB]], [0], [0])
    with pytest.raises(UserError, match=f"a capacity of 99 tokens passes the {MAX_LENGTH} of"):
        session.reopen(slots=1, capacity=99)
    with pytest.raises(UserError, match="has no engines of such graphs yet"):
        open_session(path, backend="tensorrt")


def test_text_is_generated_as_with_a_cache(path: Path, toy: Toy) -> None:
    model = load(path)
    prompts = ["what is red", "the sun"]
    result = model.generate(prompts, max_new_tokens=5, ignore_eos=True, greedy=True)
    chunked = model.generate(prompts, max_new_tokens=5, ignore_eos=True, greedy=True, prefill_chunk=2)
    for prompt, row, again in zip(prompts, result.sequences, chunked.sequences, strict=True):
        ids = model.tokenizer.encode(prompt)
        start = len(ids)
        for _ in range(5):
            ids.append(int(toy.logits(ids)[-1].argmax()))
        assert row.token_ids == again.token_ids == ids[start:]


def test_golden_steps_prove_a_bundle_without_a_cache(path: Path, toy: Toy) -> None:
    ids = [BOS, 9, 5]
    step = GoldenStep.record(
        "prefill", tokens=np.array([ids]), lengths=np.array([3]), past_lengths=np.array([0]), slots=np.array([0]),
        logits=toy.logits(ids)[None, -1:],
    )  # fmt: skip
    Golden(slots=1, capacity=8, limit=1e-4, steps=[step]).save(path / "golden.npz")
    redescribe(path)
    assert selftest(path).passed
    load(path)


def test_a_bundle_without_a_cache_says_so_where_one_is_needed(path: Path) -> None:
    bundle = Bundle.open(path)
    assert not bundle.has_cache
    with pytest.raises(UserError, match=r"declares no uniform key/value cache; .* without --no-cache"):
        _ = bundle.cache_geometry
