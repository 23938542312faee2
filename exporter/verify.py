"""The parity gate: a session of the bundle against transformers, step by step, and the golden cases that go with it.

Every way a session is used must give what one pass over the whole row gives: a prefill of unequal rows into a larger
capacity, a chunk, single tokens, and the last positions of the capacity after a cache of random keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from exporter.checkpoint import Checkpoint
from exporter.evaluate.rounded import weights_of
from exporter.evaluate.session import CachedSession, EvaluatedSession, evaluate_graph, evaluate_network
from exporter.golden_limit import NO_LIMIT, with_kernels_error, with_ties_turned
from exporter.reference import Floats as Floats64
from exporter.reference import Forward, Reference, Row
from exporter.rounded_cache import CacheView
from exporter.scaling import Scaling
from exporter.verify_rows import NON_FINITE, GateResult, has_extras, non_finite, prompts, refused, run_rows_gate
from exporter.verify_steps import DECODE_STEPS, END, Step, run_end_of_capacity, run_rows
from exporter.yardstick import LIMIT, Expected, Ledger, Yardstick, compare
from runtime.bundle import Bundle
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden, GoldenStep
from runtime.measured import Comparison, Parity
from runtime.ort_session import OrtSession
from runtime.session import Ints

NEAR_TIE = 1e-3  # a greedy token may differ where the reference's two best logits are closer than this
GOLDEN_DECODE_STEPS = 4

__all__ = ["LIMIT", "NON_FINITE", "CachedSession", "GateResult", "gate", "run_gate", "session_of", "verify"]

Progress = Callable[[str, int, int], None]


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
    precision. The same steps on a device that rounds as often differ by no more. A cache of int8 is compared with
    transformers' own, rounded to the same grid; see `exporter.rounded_cache`.
    """
    _check_same_shape(bundle, checkpoint)
    precision, total = bundle.manifest.activations, 2 + DECODE_STEPS
    evaluated_by, scaling = f"{session.backend} {session.version}", Scaling.load(bundle.path, checkpoint.spec)
    view = CacheView(bundle, scaling)
    try:
        steps, rows = run_rows(
            session, prompts(bundle), bundle.manifest.max_length, view, lambda n: progress("verify", n, total)
        )
        end = run_end_of_capacity(session, bundle, view)
    except CheckFailed as refusal:  # the graph is so wrong that the backend does not run it
        return GateResult(refused(evaluated_by, "all", refusal), None)
    reference = Reference(checkpoint, weights=weights_of(bundle, scaling), scales=view.scales)
    ties = view.scales is not None and precision == "fp32"  # in 16 bit the yardstick shows what they cost
    asked = [*(rows.as_cached() if ties else map(Row, rows.tokens)), end.as_cached() if ties else end.row]
    forwards = Yardstick(reference, precision).forwards(asked)
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
    if ties:
        golden, measured = with_ties_turned(golden, reference, asked[:-1], expected)
        comparisons = (*comparisons, *measured)
    if bundle.manifest.quantization and bundle.manifest.target == "onnxruntime":
        golden, measured = with_kernels_error(bundle, golden)
        comparisons = (*comparisons, *measured)
    passed = all(comparison.passed for comparison in comparisons)
    return GateResult(Parity(evaluated_by=evaluated_by, passed=passed, comparisons=comparisons), golden)


def _logits_at(positions: Ints) -> Callable[[Forward], Floats64]:
    return lambda forward: forward.logits[positions]


def _compare_greedy(steps: Sequence[Step], expected: Sequence[Expected], precision: str) -> list[Comparison]:
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


def _golden(steps: Sequence[Step], expected: Sequence[Expected], limit: float) -> Golden:
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
