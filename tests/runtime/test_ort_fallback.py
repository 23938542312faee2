"""A bundle for TensorRT where there is no engine and no GPU: ONNX Runtime runs its graph, and the numbers are the same.

The oracle is transformers with eager attention on the trained checkpoint, and the bundle of target `onnxruntime`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers

from runtime import load
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.ort_session import OrtSession

PROMPTS = ["Complete the paragraph: our solar system is", "Mars", "The Moon is a world of"]
CAPACITY = 48


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> transformers.NemotronForCausalLM:
    model = transformers.NemotronForCausalLM.from_pretrained(
        tiny_checkpoint, attn_implementation="eager", dtype=torch.float32
    )
    return model.eval()


@pytest.fixture
def session(tensorrt_bundle_of: Callable[[str], Path]) -> OrtSession:
    return OrtSession(Bundle.open(tensorrt_bundle_of("fp32")), slots=4, capacity=CAPACITY)


def rows_of(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 2048, length) for length in lengths]


def feed(session: OrtSession, rows: Sequence[np.ndarray], past: Sequence[int], keep: int = 1) -> np.ndarray:
    lengths = np.array([len(row) for row in rows])
    tokens = np.zeros((len(rows), lengths.max()), np.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return session.step(tokens, lengths, np.array(past), keep=keep)


def assert_logits(
    logits: np.ndarray, reference: transformers.NemotronForCausalLM, rows: Sequence[np.ndarray], keep: int = 1
) -> None:
    for row, ids in enumerate(rows):
        with torch.no_grad():
            expected = reference(torch.tensor(ids[None])).logits[0, -keep:].numpy()
        np.testing.assert_allclose(logits[row, -len(expected) :], expected, atol=1e-4)


def joined(rows: Sequence[np.ndarray], new: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.append(a, b) for a, b in zip(rows, new, strict=True)]


def test_prefill_chunk_and_decode_of_unequal_rows_are_those_of_transformers(session, reference):
    rows = rows_of(7, 2, 11)
    assert_logits(feed(session, rows, [0, 0, 0], keep=5), reference, rows, keep=5)
    for lengths in ((4, 1, 6), (1, 1, 1), (1, 1, 1)):
        new = rows_of(*lengths, seed=sum(lengths))
        logits = feed(session, new, [len(row) for row in rows])
        rows = joined(rows, new)
        assert_logits(logits, reference, rows)


def test_a_step_leaves_the_arrays_of_the_step_before_it_alone(session):
    """A caller may keep what it counts cached tokens with."""
    past = np.zeros(1, np.int64)
    session.step(np.array([[5]]), np.ones(1, np.int64), past)
    session.step(np.array([[6]]), np.ones(1, np.int64), np.ones(1, np.int64))
    assert past.tolist() == [0]


def test_padding_never_passes_the_capacity_and_never_overwrites_what_is_cached(session, reference):
    rows = rows_of(CAPACITY - 2, 3)
    feed(session, rows, [0, 0])
    new = rows_of(1, 9, seed=1)  # nine columns do not fit behind the first row, one does
    logits = feed(session, new, [CAPACITY - 2, 3])
    rows = joined(rows, new)
    assert_logits(logits, reference, rows)
    last = rows_of(1, 1, seed=2)
    assert_logits(feed(session, last, [CAPACITY - 1, 12]), reference, joined(rows, last))
    with pytest.raises(UserError, match=f"row 0: {CAPACITY} cached and 1 new tokens pass the capacity of {CAPACITY}"):
        feed(session, last, [CAPACITY, 13])


def test_past_and_present_are_one_buffer_and_a_row_is_written_where_it_lies(session):
    addresses = [session.cache.addresses(layer, 0) for layer in range(session.cache.layers)]
    views = [session.cache.read(layer) for layer in range(session.cache.layers)]
    feed(session, rows_of(3, 5), [0, 0])
    before = [part.copy() for layer in views for part in layer]
    assert all(np.abs(part[1, :, :5]).min() > 0 for part in before)  # seen through views taken before the step
    feed(session, rows_of(1, 1), [3, 5])
    for old, part in zip(before, (part for layer in views for part in layer), strict=True):
        changed = np.argwhere((old != part).any((1, 3)))
        assert changed.tolist() == [[0, 3], [1, 5]]
    assert addresses == [session.cache.addresses(layer, 0) for layer in range(session.cache.layers)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_no_step_copies_the_cache(tensorrt_bundle_of):
    """A cache of gigabytes, hardly used: copying it once would make all of it resident."""
    bundle = Bundle.open(tensorrt_bundle_of("fp32"))
    wide = replace(bundle, manifest=replace(bundle.manifest, max_length=2**20))
    session = OrtSession(wide, slots=1, capacity=2**20)
    size = sum(part.nbytes for layer in range(session.cache.layers) for part in session.cache.read(layer))
    assert size > 4e9
    before = resident_bytes()
    feed(session, rows_of(3), [0])
    feed(session, rows_of(1), [3])
    assert resident_bytes() - before < size / 10


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_greedy_text_is_that_of_the_onnxruntime_bundle_and_of_transformers(tiny_bundle, tensorrt_bundle_of, reference):
    options = {"greedy": True, "max_new_tokens": 24, "ignore_eos": True}
    ours = load(tensorrt_bundle_of("fp32")).generate(PROMPTS, **options).sequences
    theirs = load(tiny_bundle).generate(PROMPTS, **options).sequences
    assert [row.token_ids for row in ours] == [row.token_ids for row in theirs]
    prompt = load(tiny_bundle).tokenizer.encode(PROMPTS[0])
    with torch.no_grad():
        ids = list(prompt)
        for _ in range(24):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ours[0].token_ids == ids[len(prompt) :]


def test_a_prompt_in_chunks_gives_the_text_of_one_prefill(tensorrt_bundle_of):
    model = load(tensorrt_bundle_of("fp32"))
    whole, chunks = (
        model.generate(PROMPTS, greedy=True, max_new_tokens=8, prefill_chunk=chunk).sequences for chunk in (None, 3)
    )
    assert [row.token_ids for row in whole] == [row.token_ids for row in chunks]


def test_fp16_runs_and_says_what_fp32_says(tensorrt_bundle_of):
    options = {"greedy": True, "max_new_tokens": 24}
    half, single = (load(tensorrt_bundle_of(p)).generate(PROMPTS[0], **options) for p in ("fp16", "fp32"))
    assert half.backend == "onnxruntime-cpu"
    assert half.sequences[0].token_ids == single.sequences[0].token_ids


def test_bf16_is_refused_before_the_graph_is_loaded(tensorrt_bundle_of, monkeypatch):
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    with pytest.raises(
        UserError, match=r"bfloat16 does not run on ONNX Runtime; .* --precision fp16 or fp32"
    ) as caught:
        load(tensorrt_bundle_of("bf16"))
    assert caught.value.exit_code == 2
