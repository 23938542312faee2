"""Figures of quality are what numpy finds on transformers' own logits, whatever runs the bundle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from transformers import NemotronForCausalLM

from exporter import quality as module
from exporter.checkpoint import Checkpoint
from exporter.evaluation_text import default_text, read_tokens, windows
from exporter.quality import check_limits, logits_of, measure
from exporter.reference import Reference
from runtime.bundle import Bundle
from runtime.errors import CheckFailed, UserError
from runtime.manifest import Manifest
from runtime.measured import Quality
from runtime.session import open_session

WINDOWS = np.random.default_rng(0).integers(0, 97, (3, 10))
QUALITY = Quality(
    text="t.txt", tokens=30, perplexity=11.0, reference_perplexity=10.0, kl_mean=0.02, kl_p99=0.3, top1=0.9
)


def reference_logits(checkpoint: Path, rows: np.ndarray) -> np.ndarray:
    """float64 [n, length, vocab], each row by itself."""
    model = NemotronForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return np.stack([model(torch.from_numpy(row[None])).logits[0].double().numpy() for row in rows])


class Perturbed:
    """A session whose logits are transformers' and some noise; it holds to what a session may be asked."""

    def __init__(self, checkpoint: Path, noise: np.ndarray) -> None:
        self.logits = reference_logits(checkpoint, WINDOWS) + noise
        self.rows = {tuple(row): logits for row, logits in zip(WINDOWS.tolist(), self.logits, strict=True)}
        self.opened: list[int] = []
        self.capacity = 1

    def reopen(self, *, slots: int, capacity: int) -> Self:
        assert slots == 1
        self.opened.append(capacity)
        self.capacity = capacity
        return self

    def step(self, tokens: Any, lengths: Any, past: Any, slots: Any = None, keep: int = 1) -> np.ndarray:
        assert (lengths.tolist(), past.tolist(), keep) == ([self.capacity], [0], self.capacity)
        return self.rows[tuple(tokens[0])][None].astype(np.float32)


def expected(exact: np.ndarray, ours: np.ndarray) -> dict[str, float]:
    """By definition, over all windows at once."""

    def probabilities(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)

    p, q = probabilities(exact), probabilities(ours)
    following = WINDOWS[:, 1:, None]

    def perplexity(given: np.ndarray) -> float:
        return float(np.exp(-np.log(np.take_along_axis(given[:, :-1], following, 2)).mean()))

    divergence = (p * np.log(p / q)).sum(-1)
    return {
        "perplexity": perplexity(q),
        "reference_perplexity": perplexity(p),
        "kl_mean": divergence.mean(),
        "kl_p99": np.percentile(divergence, 99),
        "top1": (p.argmax(-1) == q.argmax(-1)).mean(),
    }


@pytest.mark.parametrize("chunk", [1, 97 * 4, 1 << 22])
def test_figures_are_those_of_numpy_on_transformers_logits(
    small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    session = Perturbed(small_checkpoint, np.random.default_rng(1).normal(0, 0.3, (3, 10, 97)))
    told: list[tuple[str, int, int]] = []
    checkpoint = Checkpoint.open(small_checkpoint)
    found = measure(checkpoint, logits_of(session), WINDOWS, text="t.txt", progress=lambda *at: told.append(at))  # type: ignore[arg-type]
    assert (found.text, found.tokens) == ("t.txt", 30)
    oracle = expected(reference_logits(small_checkpoint, WINDOWS), session.logits)
    assert 0 < oracle["top1"] < 1  # else agreement says nothing
    for name, value in oracle.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4), name
    assert session.opened == [10, 10, 10]
    assert told == [("quality", done, 3) for done in range(4)]


def test_a_bundle_that_is_the_reference_diverges_by_nothing(small_checkpoint: Path) -> None:
    session = Perturbed(small_checkpoint, np.zeros(1))
    found = measure(Checkpoint.open(small_checkpoint), logits_of(session), WINDOWS, text="t.txt")  # type: ignore[arg-type]
    assert found.kl_mean == pytest.approx(0, abs=1e-9)
    assert (found.top1, found.perplexity) == (1.0, pytest.approx(found.reference_perplexity, rel=1e-6))


def test_a_real_bundle_is_as_good_as_its_checkpoint(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    session = open_session(bundle, backend="onnxruntime", capacity=1)
    path = default_text("heldout.txt", tiny_checkpoint)
    rows = windows(read_tokens(path, tiny_checkpoint), bundle.manifest.max_length, 1024)
    found = measure(Checkpoint.open(tiny_checkpoint), logits_of(session), rows, text=path.name)
    assert found.tokens == 1024
    assert found.perplexity < 10  # it was trained on such texts; of 2048 tokens by chance it would be 2048
    assert found.perplexity == pytest.approx(found.reference_perplexity, rel=1e-4)
    assert found.kl_mean < 1e-6
    assert found.top1 > 0.99


def test_one_window_is_in_memory_at_a_time(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large vocabulary the logits of all windows are gigabytes."""
    order: list[str] = []
    original = Reference.each_logits

    def watched(self: Reference, rows: Any) -> Iterator[Any]:
        for logits in original(self, rows):
            order.append("transformers")
            yield logits

    monkeypatch.setattr(Reference, "each_logits", watched)

    def logits(tokens: np.ndarray) -> np.ndarray:
        order.append("bundle")
        return np.zeros((10, 97), np.float32)

    measure(Checkpoint.open(small_checkpoint), logits, WINDOWS, text="t.txt")
    assert order == ["transformers", "bundle"] * 3


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_fails(small_checkpoint: Path, wrong: float) -> None:
    noise = np.zeros((3, 10, 97))
    noise[1, 9, 5] = wrong
    session = Perturbed(small_checkpoint, noise)
    with pytest.raises(CheckFailed, match="window 1 of the text: logits of the bundle are not finite"):
        measure(Checkpoint.open(small_checkpoint), logits_of(session), WINDOWS, text="t.txt")  # type: ignore[arg-type]


def test_logits_beyond_any_perplexity_fail(small_checkpoint: Path) -> None:
    with pytest.raises(CheckFailed, match=r"perplexity of the bundle on t.txt is not finite"):
        measure(
            Checkpoint.open(small_checkpoint),
            lambda tokens: np.eye(10, 97, dtype=np.float32) * 1e6,
            WINDOWS,
            text="t.txt",
        )


def test_a_bundle_of_another_vocabulary_is_refused(small_checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"\[10, 96\].*\[10, 97\].*not of one model"):
        measure(Checkpoint.open(small_checkpoint), lambda _: np.zeros((10, 96), np.float32), WINDOWS, text="t.txt")


@pytest.mark.parametrize("shape", [(0, 10), (3, 1), (10,)])
def test_windows_that_predict_nothing_are_refused(small_checkpoint: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="at least 2 tokens each"):
        measure(
            Checkpoint.open(small_checkpoint),
            lambda _: np.zeros((1, 97), np.float32),
            np.zeros(shape, np.int64),
            text="t",
        )


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ((0.019, None), r"mean KL divergence .* on t\.txt is 0\.02 nats, the limit 0\.019; raise"),
        ((None, 9.9), r"perplexity on t\.txt rises by 10 % from 10 to 11, the limit is 9\.9 %; raise"),
        ((0.0, 0.0), "mean KL divergence"),
    ],
)
def test_a_passed_limit_names_value_and_limit(limits: tuple[float | None, float | None], words: str) -> None:
    with pytest.raises(CheckFailed, match=words):
        check_limits(QUALITY, *limits)


def test_what_is_within_its_limits_passes() -> None:
    check_limits(QUALITY)
    check_limits(QUALITY, 0.02, 10.1)
    check_limits(replace(QUALITY, perplexity=9.0), max_perplexity_increase=0.0)


def test_the_record_survives_the_manifest(tiny_bundle_copy: Path) -> None:
    replace(Manifest.load(tiny_bundle_copy), quality=QUALITY).save(tiny_bundle_copy)
    assert Manifest.load(tiny_bundle_copy).quality == QUALITY
