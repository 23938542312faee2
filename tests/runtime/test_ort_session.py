"""The oracle is transformers with eager attention on the same weights."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.ort_binding import HostBound
from runtime.ort_session import OrtSession

Reference = transformers.NemotronForCausalLM


def tokens_of(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 320, length) for length in lengths]


def padded(rows: Sequence[np.ndarray], padding: int = 0) -> np.ndarray:
    tokens = np.full((len(rows), max(map(len, rows))), padding)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return tokens


def expected(reference: Reference, ids: np.ndarray, keep: int = 1) -> np.ndarray:
    """Logits of the last `keep` positions of one sequence."""
    with torch.no_grad():
        return reference(torch.tensor(ids[None])).logits[0, -keep:].numpy()


def feed(session: OrtSession, rows: Sequence[np.ndarray], past: Sequence[int], **kwargs: Any) -> np.ndarray:
    lengths = np.array([len(row) for row in rows])
    return session.step(padded(rows), lengths, np.array(past), **kwargs)


def assert_logits(actual: np.ndarray, reference: Reference, rows: Sequence[np.ndarray]) -> None:
    for row, ids in enumerate(rows):
        np.testing.assert_allclose(actual[row, -1], expected(reference, ids)[0], atol=1e-4)


def test_unequal_prompts_and_the_steps_after_them_are_those_of_transformers(
    session: OrtSession, reference: Reference
) -> None:
    rows = tokens_of(7, 2, 11)
    assert_logits(feed(session, rows, [0, 0, 0]), reference, rows)
    for step in range(5):
        new = tokens_of(1, 1, 1, seed=step + 1)
        logits = feed(session, new, [len(row) for row in rows])
        rows = [np.append(row, token) for row, token in zip(rows, new, strict=True)]
        assert_logits(logits, reference, rows)


def test_chunks_of_a_batch_with_a_past_are_those_of_transformers(session: OrtSession, reference: Reference) -> None:
    first, second = tokens_of(5, 3), tokens_of(2, 6, seed=1)
    feed(session, first, [0, 0])
    logits = feed(session, second, [5, 3])
    assert_logits(logits, reference, [np.append(a, b) for a, b in zip(first, second, strict=True)])


@pytest.mark.parametrize("keep", [1, 6])
def test_long_prompts_run_in_parts_and_their_logits_are_those_of_transformers(
    session: OrtSession, reference: Reference, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    """In one part, what the operators of a layer hold would grow with the prompt, and never be given back."""
    monkeypatch.setattr("runtime.ort_session.PREFILL_WIDTH", 4)
    rows = tokens_of(11, 2, 8)
    logits = feed(session, rows, [0, 0, 0], keep=keep)
    for row, ids in enumerate(rows):
        wanted = expected(reference, ids, keep)
        np.testing.assert_allclose(logits[row, -len(wanted) :], wanted, atol=1e-4)
    bindings = [bound for bound in session._bindings.values() if isinstance(bound, HostBound)]
    assert max(bound.inputs["input_ids"].shape[1] for bound in bindings) == 4


def test_slots_may_be_used_in_any_order_and_the_others_are_left_alone(
    session: OrtSession, reference: Reference
) -> None:
    rows = tokens_of(4, 6, 3, 5)
    feed(session, rows, [0, 0, 0, 0])
    before = [part[1].copy() for layer in range(2) for part in session.cache.read(layer)]
    new = tokens_of(1, 2, 1, seed=1)
    logits = feed(session, new, [5, 4, 3], slots=np.array([3, 0, 2]))
    assert_logits(logits, reference, [np.append(rows[slot], ids) for slot, ids in zip((3, 0, 2), new, strict=True)])
    after = [part[1] for layer in range(2) for part in session.cache.read(layer)]
    np.testing.assert_array_equal(before, after)


def test_several_last_positions_come_as_asked(session: OrtSession, reference: Reference) -> None:
    rows = tokens_of(6, 2)
    logits = feed(session, rows, [0, 0], keep=3)
    assert logits.shape == (2, 3, 320)
    np.testing.assert_allclose(logits[0], expected(reference, rows[0], 3), atol=1e-4)
    two = expected(reference, rows[1], 2)
    np.testing.assert_allclose(logits[1], [two[0], two[0], two[1]], atol=1e-4)  # the first is repeated


def test_the_last_place_of_the_capacity_is_used_and_none_beyond(session: OrtSession, reference: Reference) -> None:
    rows = tokens_of(47, 20)
    feed(session, rows, [0, 0])
    new = tokens_of(1, 1, seed=1)
    logits = feed(session, new, [47, 20])
    assert_logits(logits, reference, [np.append(a, b) for a, b in zip(rows, new, strict=True)])
    with pytest.raises(UserError, match=r"row 0: 48 cached and 1 new tokens pass the capacity of 48"):
        feed(session, new, [48, 21])


def test_padding_alone_never_passes_the_capacity(session: OrtSession, reference: Reference) -> None:
    rows = tokens_of(46, 3)
    feed(session, rows, [0, 0])
    new = tokens_of(1, 9, seed=1)  # nine columns do not fit after 46 tokens, one does
    logits = feed(session, new, [46, 3])
    assert_logits(logits, reference, [np.append(a, b) for a, b in zip(rows, new, strict=True)])


def test_what_stands_in_the_padding_does_not_matter(session: OrtSession) -> None:
    rows, lengths, past = tokens_of(5, 2), np.array([5, 2]), np.zeros(2, int)
    clean = session.step(padded(rows), lengths, past)
    np.testing.assert_array_equal(session.step(padded(rows, padding=10**9), lengths, past), clean)


def test_logits_belong_to_the_caller(session: OrtSession) -> None:
    first = feed(session, tokens_of(3), [0])
    kept = first.copy()
    feed(session, tokens_of(3, seed=5), [0])
    np.testing.assert_array_equal(first, kept)


def test_a_seeded_cache_is_the_past(session: OrtSession, reference: Reference) -> None:
    """What the parity gate does at the end of the capacity."""
    random, past = np.random.default_rng(0), 40
    cache = transformers.DynamicCache()
    for layer in range(2):
        key, value = random.normal(size=(2, *session.cache.shape)).astype(np.float32)
        session.cache.write(layer, key, value)
        cache.update(torch.tensor(key[:1, :, :past]), torch.tensor(value[:1, :, :past]), layer)
    ids = tokens_of(8)[0]
    with torch.no_grad():
        reply = reference(torch.tensor(ids[None]), past_key_values=cache).logits[0].numpy()
    np.testing.assert_allclose(feed(session, [ids], [past], keep=8)[0], reply, atol=1e-4)
    for layer in range(2):
        keys, values = session.cache.read(layer)
        np.testing.assert_allclose(keys[0], cache.layers[layer].keys[0].numpy(), atol=1e-4)
        np.testing.assert_allclose(values[0], cache.layers[layer].values[0].numpy(), atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_no_step_copies_the_cache(bundle_dir: Path) -> None:
    """A cache of gigabytes, hardly used: copying it once would make all of it resident."""
    bundle = Bundle.open(bundle_dir)
    wide = replace(bundle, manifest=replace(bundle.manifest, max_length=2**21))
    session = OrtSession(wide, slots=2, capacity=2**21)
    size = sum(part.nbytes for layer in range(2) for part in session.cache.read(layer))
    assert size > 4e9
    before = resident_bytes()
    feed(session, tokens_of(3, 5), [0, 0])
    for step in range(3):
        feed(session, tokens_of(1, 1), [3 + step, 5 + step])
    feed(session, tokens_of(4), [6])
    assert resident_bytes() - before < size / 50


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_sessions_share_weights_but_not_their_caches(session: OrtSession, reference: Reference) -> None:
    other = session.reopen(slots=1, capacity=9)
    assert (other.slots, other.capacity, session.slots, session.capacity) == (1, 9, 4, 48)
    rows, elsewhere, new = tokens_of(4), tokens_of(6, seed=3), tokens_of(1, seed=4)
    feed(session, rows, [0])
    feed(other, elsewhere, [0])
    assert_logits(feed(session, new, [4]), reference, [np.append(rows[0], new[0])])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [[5, 320]]}, r"row 0: token id 320 is outside the vocabulary of 320"),
        ({"tokens": [[-1, 5]]}, r"token id -1 is outside"),
        ({"lengths": [0]}, r"lengths \[0\] should be within 1..2"),
        ({"lengths": [3]}, r"lengths \[3\] should be within 1..2"),
        ({"past_lengths": [-1]}, r"should not be negative"),
        ({"past_lengths": [47]}, r"row 0: 47 cached and 2 new tokens pass the capacity of 48; .* up to 96"),
        ({"slots": [4]}, r"slots \[4\] should be distinct and within 0..3"),
        ({"tokens": [[5, 6]] * 2, "lengths": [2, 2], "past_lengths": [0, 0], "slots": [1, 1]}, "distinct"),
        ({"tokens": [5, 6]}, r"a step takes tokens \[batch, sequence\]"),
        ({"lengths": [1, 1]}, r"a step takes tokens"),
        ({"keep": 0}, "keep should be at least 1"),
    ],
)
def test_a_step_that_would_go_wrong_is_refused(session: OrtSession, change: dict[str, Any], message: str) -> None:
    step: dict[str, Any] = {"tokens": [[5, 6]], "lengths": [2], "past_lengths": [0], "slots": [0]} | change
    keep = step.pop("keep", 1)
    with pytest.raises(UserError, match=message):
        session.step(**{name: np.array(value) for name, value in step.items()}, keep=keep)
