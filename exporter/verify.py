"""The parity gate: a session of the bundle against transformers, step by step, and the golden cases that go with it.

Every way a session is used must give what one pass over the whole row gives: a prefill of unequal rows into a larger
capacity, a chunk, single tokens, and the last positions of the capacity after a cache of random keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from exporter.checkpoint import Checkpoint
from exporter.engine_options import NATIVE, PLUGIN
from exporter.evaluate.rounded import weights_of
from exporter.evaluate.session import CachedSession, EvaluatedSession, evaluate_graph, evaluate_network
from exporter.gate_size import fits_whole, refusal
from exporter.golden_limit import kernels_error, rounds_activations, ties_error, with_kernels_error, with_ties_turned
from exporter.reference import Reference, Row
from exporter.rounded_cache import CacheView
from exporter.scaling import Scaling
from exporter.verdict import Verdict, note_logits
from exporter.verify_layers import run_layered_gate
from exporter.verify_rows import NON_FINITE, GateResult, has_extras, non_finite, prompts, refused, run_rows_gate
from exporter.verify_steps import DECODE_STEPS, END, run_end_of_capacity, run_rows
from exporter.yardstick import LIMIT, Ledger, Yardstick
from runtime.bundle import Bundle
from runtime.errors import CheckFailed, UserError
from runtime.measured import Parity
from runtime.ort_session import OrtSession

__all__ = ["LIMIT", "NON_FINITE", "CachedSession", "GateResult", "gate", "run_gate", "session_of", "verify"]

Progress = Callable[[str, int, int], None]


def verify(
    bundle: Path,
    checkpoint: Path | str,
    progress: Progress = lambda *_: None,
    *,
    network: bool = False,
    attention: str = NATIVE,
    adapter: Path | None = None,
    revision: str | None = None,
    memory: int | None = None,
) -> Parity:
    """Check a bundle against the checkpoint it was made from, as `export` does.

    Args:
        bundle: the bundle's directory.
        checkpoint: the Hugging Face checkpoint's directory, or its hub id.
        progress: called with "verify", the cases done and their number.
        network: check what the installed TensorRT's parser makes of the graph, mended as `build` mends it, instead.
        attention: `PLUGIN` to check the graph that an engine with the attention kernels is built of, evaluated.
        adapter, revision: as `export` was given them.
        memory: bytes that may be used in all (default: what the machine has available).

    Raises:
        UserError: either cannot be opened, they are not of one architecture, no TensorRT is installed, or the memory
            does not suffice.
    """
    opened, model = Bundle.open(bundle), Checkpoint.open(checkpoint, adapter, revision=revision)
    if attention == PLUGIN:
        check_for_plugin(opened)
    layered = not network and not fits_whole(model, memory)
    if layered and (not opened.has_cache or has_extras(opened)):
        raise refusal(model, memory)
    return gate(opened, model, progress, network=network, attention=attention, layered=layered).parity


def check_for_plugin(bundle: Bundle) -> None:
    """Refuse what is not checked with the attention kernels' ops.

    Raises:
        UserError: the bundle is of another target or hands out more than logits.
    """
    if not bundle.has_cache or bundle.manifest.target != "tensorrt" or has_extras(bundle):
        raise UserError(
            f"{bundle.path} is not one that engines with the attention kernels are built of; drop --attention plugin"
        )


def gate(
    bundle: Bundle,
    checkpoint: Checkpoint,
    progress: Progress = lambda *_: None,
    *,
    network: bool = False,
    attention: str = NATIVE,
    layered: bool = False,
) -> GateResult:
    """Compare a bundle with its checkpoint: step by step where it has a cache, else on whole rows.

    What a graph with a cache hands out or takes beyond that (hidden states, positions) is compared on whole rows too.

    Args:
        bundle: of any task.
        checkpoint: what it was made from.
        progress: called with "verify", what is done and how much there is.
        network: what TensorRT's parser makes of the graph, instead of the graph.
        attention: `PLUGIN` for the graph with the kernels' ops.
        layered: hold one layer of either in memory at a time; of graphs with a cache and nothing beyond it.
    """
    if layered:
        check_same_shape(bundle, checkpoint)
        return run_layered_gate(bundle, checkpoint, progress, attention)
    if not bundle.has_cache:
        return run_rows_gate(bundle, checkpoint, progress, network=network)
    session = evaluate_network(bundle, attention=attention) if network else session_of(bundle, attention)
    result = run_gate(bundle, checkpoint, session, progress)
    if not has_extras(bundle):
        return result
    rows = run_rows_gate(bundle, checkpoint, progress, network=network).parity
    both = replace(
        result.parity,
        passed=result.parity.passed and rows.passed,
        comparisons=(*result.parity.comparisons, *rows.comparisons),
    )
    return GateResult(both, result.golden)


def session_of(bundle: Bundle, attention: str = NATIVE) -> CachedSession:
    """What the gate runs: ONNX Runtime for fp32; else the evaluation, which rounds as the graph says and no more."""
    if bundle.manifest.precision == "fp32" and attention == NATIVE:
        return OrtSession(bundle, slots=1, capacity=1)
    return evaluate_graph(bundle, attention)


def run_gate(
    bundle: Bundle, checkpoint: Checkpoint, session: CachedSession, progress: Progress = lambda *_: None
) -> GateResult:
    """Run every case on a session of the bundle and compare it with transformers.

    A cache of int8 is compared with transformers' own, rounded to the same grid; see `exporter.rounded_cache`.
    """
    check_same_shape(bundle, checkpoint)
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
    note_logits(ledger, steps, expected)
    for slot, whole in enumerate(expected):
        length = len(rows.tokens[slot])
        ledger.add("present", "decode", rows.keys[slot][:, :, :length], whole, lambda forward: forward.keys)
        ledger.add("present", "decode", rows.values[slot][:, :, :length], whole, lambda forward: forward.values)
    ledger.add("logits", END, end.logits, forwards[-1], lambda forward: forward.logits)
    ledger.add("present", END, end.keys, forwards[-1], lambda forward: forward.keys)
    ledger.add("present", END, end.values, forwards[-1], lambda forward: forward.values)
    progress("verify", total, total)

    found = non_finite(session.non_finite) if isinstance(session, EvaluatedSession) else []
    verdict = Verdict(steps, expected, ledger, found)
    if ties:
        verdict.allow(*with_ties_turned(verdict.golden, ties_error(reference, asked[:-1], expected)))
    if rounds_activations(bundle):
        verdict.allow(*with_kernels_error(verdict.golden, kernels_error(bundle, verdict.golden)))
    return verdict.result(evaluated_by)


def check_same_shape(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Refuse a bundle with a cache that cannot be of this checkpoint.

    Raises:
        UserError: layers, key/value heads, head width or vocabulary differ.
    """
    spec, geometry = checkpoint.spec, bundle.cache_geometry
    theirs = (spec.layers, spec.kv_heads, spec.head_dim, spec.vocab)
    ours = (geometry.layers, geometry.kv_heads, geometry.head_dim, bundle.vocab_size)
    if theirs != ours:
        raise UserError(
            f"{bundle.path} and {checkpoint.path} are not of one model: layers, kv_heads, head_dim and vocabulary are "
            f"{ours} and {theirs}; give the checkpoint that the bundle was made from"
        )
