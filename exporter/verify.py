"""The parity gate: a session of the bundle against transformers, step by step, and the golden cases that go with it.

Every way a session is used must give what one pass over the whole row gives: a prefill of unequal rows into a larger
capacity, a chunk, single tokens, and the last positions of the capacity after a cache of random keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporter.checkpoint import Checkpoint
from exporter.evaluate.rounded import weights_of
from exporter.evaluate.session import CachedSession, EvaluatedSession, evaluate_graph, evaluate_network
from exporter.golden_limit import NO_LIMIT, with_kernels_error
from exporter.reference import Floats as Floats64
from exporter.reference import Forward, Reference, Row
from exporter.scaling import Scaling
from exporter.verify_rows import NON_FINITE, GateResult, has_extras, non_finite, prompts, refused, run_rows_gate
from exporter.yardstick import LIMIT, Expected, Ledger, Yardstick, compare
from runtime.bundle import Bundle
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden, GoldenStep
from runtime.manifest import Comparison, Parity
from runtime.ort_session import OrtSession
from runtime.session import Floats, Ints

NEAR_TIE = 1e-3  # a greedy token may differ where the reference's two best logits are closer than this
END = "end of capacity"
DECODE_STEPS = 32
GOLDEN_DECODE_STEPS = 4

__all__ = ["LIMIT", "NON_FINITE", "CachedSession", "GateResult", "gate", "run_gate", "session_of", "verify"]

Progress = Callable[[str, int, int], None]


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


def verify(
    bundle: Path,
    checkpoint: Path | str,
    progress: Progress = lambda *_: None,
    *,
    network: bool = False,
    adapter: Path | None = None,
    revision: str | None = None,
) -> Parity:
    """Check a bundle against the checkpoint it was made from, as `export` does.

    Args:
        bundle: the bundle's directory.
        checkpoint: the Hugging Face checkpoint's directory, or its hub id.
        progress: called with "verify", the cases done and their number.
        network: check what the installed TensorRT's parser makes of the graph, mended as `build` mends it, instead.
        adapter, revision: as `export` was given them.

    Raises:
        UserError: either cannot be opened, they are not of one architecture, or no TensorRT is installed.
    """
    opened = Bundle.open(bundle)
    return gate(opened, Checkpoint.open(checkpoint, adapter, revision=revision), progress, network=network).parity


def gate(
    bundle: Bundle, checkpoint: Checkpoint, progress: Progress = lambda *_: None, *, network: bool = False
) -> GateResult:
    """Compare a bundle with its checkpoint: step by step where it has a cache, else on whole rows.

    What a graph with a cache hands out or takes beyond that (hidden states, positions) is compared on whole rows too.
    """
    if not bundle.has_cache:
        return run_rows_gate(bundle, checkpoint, progress, network=network)
    result = run_gate(bundle, checkpoint, evaluate_network(bundle) if network else session_of(bundle), progress)
    if not has_extras(bundle):
        return result
    rows = run_rows_gate(bundle, checkpoint, progress, network=network).parity
    both = replace(
        result.parity,
        passed=result.parity.passed and rows.passed,
        comparisons=(*result.parity.comparisons, *rows.comparisons),
    )
    return GateResult(both, result.golden)


def session_of(bundle: Bundle) -> CachedSession:
    """What the gate runs: ONNX Runtime for fp32; else the evaluation, which rounds as the graph says and no more."""
    return OrtSession(bundle, slots=1, capacity=1) if bundle.manifest.precision == "fp32" else evaluate_graph(bundle)


def run_gate(
    bundle: Bundle, checkpoint: Checkpoint, session: CachedSession, progress: Progress = lambda *_: None
) -> GateResult:
    """Run every case on a session of the bundle and compare it with transformers.

    In 16 bit, golden cases get the limit of the logits: twice the largest |Δ| that transformers itself shows at that
    precision. The same steps on a device that rounds as often differ by no more.
    """
    _check_same_shape(bundle, checkpoint)
    precision, total = bundle.manifest.activations, 2 + DECODE_STEPS
    scaling = Scaling.load(bundle.path, checkpoint.spec)
    evaluated_by = f"{session.backend} {session.version}"
    try:
        steps, rows = _run_rows(
            session, prompts(bundle), bundle.manifest.max_length, scaling, lambda n: progress("verify", n, total)
        )
        end = _run_end_of_capacity(session, bundle, scaling)
    except CheckFailed as refusal:  # the graph is so wrong that the backend does not run it
        return GateResult(refused(evaluated_by, "all", refusal), None)
    reference = Reference(checkpoint, weights=weights_of(bundle, scaling))
    forwards = Yardstick(reference, precision).forwards([*map(Row, rows.tokens), end.row])
    expected, ledger = forwards[:-1], Ledger(precision)
    for step in steps:
        for row, slot in enumerate(step.slots):
            at = step.positions[row]
            ledger.add("logits", step.case, step.logits[row], expected[slot], _logits_at(at))
    for slot, whole in enumerate(expected):
        length = len(rows.tokens[slot])
        ledger.add("present", "decode", rows.keys[slot][:, :, :length], whole, lambda forward: forward.keys)
        ledger.add("present", "decode", rows.values[slot][:, :, :length], whole, lambda forward: forward.values)
    ledger.add("logits", END, end.logits, forwards[-1], lambda forward: forward.logits)
    ledger.add("present", END, end.keys, forwards[-1], lambda forward: forward.keys)
    ledger.add("present", END, end.values, forwards[-1], lambda forward: forward.values)
    progress("verify", total, total)

    limits = ledger.comparisons()
    found = non_finite(session.non_finite) if isinstance(session, EvaluatedSession) else []
    comparisons = (*found, *limits, *_compare_greedy(steps, expected, precision))
    limit = max(found.limit for found in limits if (found.name, found.metric) == ("logits", "max_abs"))
    golden = _golden(steps, expected, limit)
    if bundle.manifest.quantization and bundle.manifest.target == "onnxruntime":
        golden, measured = with_kernels_error(bundle, golden)
        comparisons = (*comparisons, *measured)
    passed = all(comparison.passed for comparison in comparisons)
    return GateResult(Parity(evaluated_by=evaluated_by, passed=passed, comparisons=comparisons), golden)


def _logits_at(positions: Ints) -> Callable[[Forward], Floats64]:
    return lambda forward: forward.logits[positions]


@dataclass(frozen=True)
class _Rows:
    """What the rows held in the end: tokens, and per row keys and values [layers, kv_heads, capacity, head_dim]."""

    capacity: int
    tokens: list[list[int]]
    keys: list[Floats]
    values: list[Floats]


def _run_rows(
    loaded: CachedSession,
    prompts: list[list[int]],
    max_length: int,
    scaling: Scaling,
    progress: Callable[[int], None],
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
    caches = [_read_cache(session, layer, scaling) for layer in range(session.cache.layers)]
    keys, values = (np.stack([pair[i] for pair in caches], 1) for i in (0, 1))
    return steps, _Rows(capacity, rows, list(keys), list(values))


@dataclass(frozen=True)
class _End:
    """The last positions of the capacity: what ran, and the logits, keys and values it gave."""

    row: Row
    logits: Floats
    keys: Floats
    values: Floats


def _run_end_of_capacity(loaded: CachedSession, bundle: Bundle, scaling: Scaling) -> _End:
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
        session.cache.write(layer, *(random.standard_normal(shape, np.float32) for _ in range(2)))
        key, value = _read_cache(session, layer, scaling)  # as the cache rounded them
        seeded.append((key[0, :, :past], value[0, :, :past]))

    logits = []
    for chunk, start in ((tokens[:-1], past), (tokens[-1:], capacity - 1)):
        if len(chunk):
            length = np.array([len(chunk)])
            logits.append(session.step(chunk[None], length, np.array([start]), keep=len(chunk))[0])
    caches = [_read_cache(session, layer, scaling) for layer in range(geometry.layers)]
    keys, values = (np.stack([pair[i][0, :, past:] for pair in caches]) for i in (0, 1))
    return _End(Row(tokens.tolist(), seeded), np.concatenate(logits), keys, values)


def _read_cache(session: CachedSession, layer: int, scaling: Scaling) -> tuple[Floats, Floats]:
    """A layer's keys and values as the checkpoint's model has them, float32 [slots, kv_heads, capacity, head_dim]."""
    key, value = (array.astype(np.float32) for array in session.cache.read(layer))
    factor = scaling.of_values(layer)
    return key, value if factor is None else value * factor.numpy()


def _compare_greedy(steps: Sequence[_Step], expected: Sequence[Expected], precision: str) -> list[Comparison]:
    """In fp32 greedy choices equal the reference's unless its two best logits nearly tie; in 16 bit it counts."""
    wrong = ties = 0
    for step in steps:
        for row, slot in enumerate(step.slots):
            exact = expected[slot].exact.logits[step.positions[row]]
            best = np.sort(exact, axis=-1)
            tied = best[:, -1] - best[:, -2] < NEAR_TIE
            differs = step.logits[row].argmax(-1) != exact.argmax(-1)
            ties += int((differs & tied).sum())
            wrong += int((differs & ~tied).sum())
    found = [("different_tokens", wrong, 0.0 if precision == "fp32" else NO_LIMIT)]
    found += [("near_ties_excused", ties, NO_LIMIT)] if ties else []
    return [compare("greedy", "all", metric, float(value), limit) for metric, value, limit in found]


def _golden(steps: Sequence[_Step], expected: Sequence[Expected], limit: float) -> Golden:
    """The reference's own logits for the prefill, the chunk and the first single tokens."""
    decode = [step for step in steps if step.case == "decode"][:GOLDEN_DECODE_STEPS]
    kept = [step for step in steps if step.case != "decode"] + decode
    recorded = []
    for step in kept:
        logits = [expected[slot].exact.logits[at] for slot, at in zip(step.slots, step.positions, strict=True)]
        recorded.append(
            GoldenStep.record(
                step.case,
                tokens=step.tokens,
                lengths=step.lengths,
                past_lengths=step.past,
                slots=step.slots,
                logits=np.stack(logits).astype(np.float32),
            )
        )
    capacity = max(int(step.past.max()) + step.tokens.shape[1] for step in kept)  # padding of one row beside another
    return Golden(slots=len(expected), capacity=capacity, limit=limit, steps=recorded)


def _check_same_shape(bundle: Bundle, checkpoint: Checkpoint) -> None:
    spec, geometry = checkpoint.spec, bundle.cache_geometry
    theirs = (spec.layers, spec.kv_heads, spec.head_dim, spec.vocab)
    ours = (geometry.layers, geometry.kv_heads, geometry.head_dim, bundle.vocab_size)
    if theirs != ours:
        raise UserError(
            f"{bundle.path} and {checkpoint.path} are not of one model: layers, kv_heads, head_dim and vocabulary are "
            f"{ours} and {theirs}; give the checkpoint that the bundle was made from"
        )
