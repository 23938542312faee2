"""The parity gate: the bundle's session against transformers, step by step, and the golden cases that travel with it.

Every way a session is used must give what one pass over the whole row gives: a prefill of unequal rows into a larger
capacity, a chunk, single tokens, and the last positions of the capacity after a cache of random keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporter.checkpoint import Checkpoint
from exporter.reference import Forward, Reference
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.golden import Golden, GoldenStep
from runtime.manifest import Comparison, Parity
from runtime.ort_session import OrtSession
from runtime.session import Floats, Ints
from runtime.tokenizer import Tokenizer

Doubles = NDArray[np.float64]

LIMIT = 1e-4  # of |Δ| in fp32, unless the reference itself is further than a third of it from fp64
NEAR_TIE = 1e-3  # a greedy token may differ where the reference's two best logits are closer than this
DECODE_STEPS = 32
GOLDEN_DECODE_STEPS = 4
SENTENCE = "The solar system consists of the Sun and the planets, moons, comets and asteroids that orbit it."


@dataclass(frozen=True)
class GateResult:
    """What the gate compared, and the golden cases for the bundle."""

    parity: Parity
    golden: Golden


@dataclass(frozen=True)
class _Step:
    """One `Session.step`, and the logits it gave: float32 [batch, keep, vocab]."""

    case: str
    tokens: Ints
    lengths: Ints
    past: Ints
    slots: Ints
    logits: Floats

    @property
    def positions(self) -> Ints:
        """The row position of every logit, int64 [batch, keep]."""
        keep = self.logits.shape[1]
        within: Ints = np.maximum(self.lengths[:, None] - keep + np.arange(keep), 0)
        return self.past[:, None] + within


@dataclass
class _Ledger:
    """The largest difference of each kind and case, and the largest error of the reference itself."""

    limit: float
    rows: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, case: str, ours: Floats, single: Doubles, double: Doubles) -> None:
        difference, error = (float(np.abs(a - b).max(initial=0.0)) for a, b in ((ours, single), (single, double)))
        before = self.rows.get((name, case), (0.0, 0.0))
        self.rows[name, case] = (float(np.maximum(before[0], difference)), max(before[1], error))

    def comparisons(self) -> list[Comparison]:
        """As records; a difference that is not a number never passes."""
        found = []
        for (name, case), (difference, error) in self.rows.items():
            limit = max(self.limit, 3 * error)
            value = difference if np.isfinite(difference) else None
            passed = value is not None and value <= limit
            found.append(Comparison(name=name, case=case, metric="max_abs", value=value, limit=limit, passed=passed))
        return found


def verify(bundle: Path, checkpoint: Path, progress: Callable[[str, int, int], None] = lambda *_: None) -> Parity:
    """Check a bundle against the checkpoint it was made from, as `export` does.

    Args:
        bundle: the bundle's directory.
        checkpoint: the Hugging Face checkpoint's directory.
        progress: called with "verify", the cases done and their number.

    Raises:
        UserError: either cannot be opened, or they are not of one architecture.
    """
    return run_gate(Bundle.open(bundle), Checkpoint.open(checkpoint), progress).parity


def run_gate(
    bundle: Bundle, checkpoint: Checkpoint, progress: Callable[[str, int, int], None] = lambda *_: None
) -> GateResult:
    """Run every case on ONNX Runtime's CPU and compare it with transformers."""
    _check_same_shape(bundle, checkpoint)
    session = OrtSession(bundle, slots=1, capacity=1)
    reference = Reference(checkpoint)
    ledger = _Ledger(LIMIT)
    total = 2 + DECODE_STEPS

    steps, rows = _run_rows(
        session, _prompts(bundle), bundle.manifest.max_length, lambda n: progress("verify", n, total)
    )
    forwards = [reference.forward(row) for row in rows.tokens]
    for step in steps:
        for row, slot in enumerate(step.slots):
            at = step.positions[row]
            single, double = forwards[slot]
            ledger.add("logits", step.case, step.logits[row], single.logits[at], double.logits[at])
    for slot, (single, double) in enumerate(forwards):
        length = len(rows.tokens[slot])
        ledger.add("present", "decode", rows.keys[slot][:, :, :length], single.keys, double.keys)
        ledger.add("present", "decode", rows.values[slot][:, :, :length], single.values, double.values)
    _check_end_of_capacity(session, reference, bundle, ledger)
    progress("verify", total, total)

    comparisons = [*ledger.comparisons(), *_compare_greedy(steps, forwards)]
    parity = Parity(
        evaluated_by=f"{session.backend} {session.version}",
        passed=all(comparison.passed for comparison in comparisons),
        comparisons=tuple(comparisons),
    )
    limit = max(comparison.limit for comparison in comparisons if comparison.name == "logits")
    return GateResult(parity, _golden(steps, forwards, rows.capacity, limit))


@dataclass(frozen=True)
class _Rows:
    """What the rows held in the end: tokens, and per row keys and values [layers, kv_heads, capacity, head_dim]."""

    capacity: int
    tokens: list[list[int]]
    keys: list[Floats]
    values: list[Floats]


def _run_rows(
    loaded: OrtSession, prompts: list[list[int]], max_length: int, progress: Callable[[int], None]
) -> tuple[list[_Step], _Rows]:
    """Prefill three unequal rows, append a chunk to one of them, then decode all of them greedily."""
    capacity = min(max_length, 4 * max(map(len, prompts)))
    longest = max(1, min(max(map(len, prompts)), capacity // 3))
    chunk = max(1, longest // 4)
    rows = [prompts[0][:longest], prompts[1][: max(1, longest // 3)], prompts[2][: max(1, 2 * longest // 3)]]
    session = loaded.reopen(slots=len(rows), capacity=capacity)
    steps: list[_Step] = []

    def step(case: str, new: list[list[int]], slots: list[int], keep: int) -> Floats:
        tokens = np.array([row + [0] * (max(map(len, new)) - len(row)) for row in new])
        lengths, at = np.array([len(row) for row in new]), np.array(slots)
        past = np.array([len(rows[slot]) for slot in slots]) if case != "prefill" else np.zeros_like(at)
        logits = session.step(tokens, lengths, past, at, keep)
        steps.append(_Step(case, tokens, lengths, past, at, logits))
        progress(len(steps))
        return logits

    everyone = list(range(len(rows)))
    logits = step("prefill", rows, everyone, longest)[:, -1]
    if len(rows[1]) + chunk < capacity:
        logits = logits.copy()
        addition = prompts[1][-chunk:]
        logits[1] = step("chunk", [addition], [1], chunk)[0, -1]
        rows[1] = rows[1] + addition
    for _ in range(min(DECODE_STEPS, capacity - max(map(len, rows)))):
        new = [[int(row.argmax())] for row in logits]
        logits = step("decode", new, everyone, 1)[:, -1]
        rows = [row + token for row, token in zip(rows, new, strict=True)]
    keys, values = (
        np.stack([session.cache.read(layer)[i] for layer in range(session.cache.layers)], 1) for i in (0, 1)
    )
    return steps, _Rows(capacity, rows, list(keys), list(values))


def _check_end_of_capacity(loaded: OrtSession, reference: Reference, bundle: Bundle, ledger: _Ledger) -> None:
    """Fill all but the last positions of the capacity with random keys and values; then a chunk and a last token."""
    capacity = bundle.manifest.max_length
    count = min(8, max(1, capacity // 2))
    past = capacity - count
    random = np.random.default_rng(1)
    tokens = random.integers(bundle.vocab_size, size=count)
    session = loaded.reopen(slots=1, capacity=capacity)
    geometry = bundle.cache_geometry
    shape = (1, geometry.kv_heads, capacity, geometry.head_dim)
    seeded = []
    for layer in range(geometry.layers):
        key, value = (random.standard_normal(shape, np.float32) for _ in range(2))
        session.cache.write(layer, key, value)
        seeded.append((key[0, :, :past], value[0, :, :past]))

    logits = []
    for chunk, start in ((tokens[:-1], past), (tokens[-1:], capacity - 1)):
        if len(chunk):
            length = np.array([len(chunk)])
            logits.append(session.step(chunk[None], length, np.array([start]), keep=len(chunk))[0])
    single, double = reference.forward([int(token) for token in tokens], seeded)
    case = "end of capacity"
    ledger.add("logits", case, np.concatenate(logits), single.logits, double.logits)
    for layer in range(geometry.layers):
        key, value = (array[0, :, past:] for array in session.cache.read(layer))
        ledger.add("present", case, key, single.keys[layer], double.keys[layer])
        ledger.add("present", case, value, single.values[layer], double.values[layer])


def _compare_greedy(steps: Sequence[_Step], forwards: Sequence[tuple[Forward, Forward]]) -> list[Comparison]:
    """Every greedy choice equals the reference's, but where its two best logits are nearly tied, which is counted."""
    wrong = ties = 0
    for step in steps:
        for row, slot in enumerate(step.slots):
            expected = forwards[slot][0].logits[step.positions[row]]
            differ = expected.argmax(-1) != step.logits[row].argmax(-1)
            best = np.sort(expected, axis=-1)[:, -2:]
            tied = best[:, -1] - best[:, 0] < NEAR_TIE
            wrong, ties = wrong + int((differ & ~tied).sum()), ties + int((differ & tied).sum())
    found = [("different_tokens", wrong, 0.0)] + ([("near_ties_excused", ties, float("1e9"))] if ties else [])
    return [
        Comparison(name="greedy", case="all", metric=metric, value=value, limit=limit, passed=value <= limit)
        for metric, value, limit in found
    ]


def _golden(steps: Sequence[_Step], forwards: Sequence[tuple[Forward, Forward]], capacity: int, limit: float) -> Golden:
    """The reference's own logits for the prefill, the chunk and the first single tokens."""
    decode = [step for step in steps if step.case == "decode"][:GOLDEN_DECODE_STEPS]
    kept = [step for step in steps if step.case != "decode"] + decode
    recorded = []
    for step in kept:
        expected = [forwards[slot][0].logits[at] for slot, at in zip(step.slots, step.positions, strict=True)]
        recorded.append(
            GoldenStep.record(
                step.case,
                tokens=step.tokens,
                lengths=step.lengths,
                past_lengths=step.past,
                slots=step.slots,
                logits=np.stack(expected).astype(np.float32),
            )
        )
    return Golden(slots=len(forwards), capacity=capacity, limit=limit, steps=recorded)


def _prompts(bundle: Bundle) -> list[list[int]]:
    """One row of text and two of random token ids, of equal length."""
    text = Tokenizer(bundle).encode(SENTENCE)[:24]
    random = np.random.default_rng(0).integers(bundle.vocab_size, size=(2, max(len(text), 8)))
    return [text, *random.tolist()]


def _check_same_shape(bundle: Bundle, checkpoint: Checkpoint) -> None:
    spec, geometry = checkpoint.spec, bundle.cache_geometry
    theirs = (spec.layers, spec.kv_heads, spec.head_dim, spec.vocab)
    ours = (geometry.layers, geometry.kv_heads, geometry.head_dim, bundle.vocab_size)
    if theirs != ours:
        raise UserError(
            f"{bundle.path} and {checkpoint.path} are not of one model: layers, kv_heads, head_dim and vocabulary are "
            f"{ours} and {theirs}; give the checkpoint that the bundle was made from"
        )
