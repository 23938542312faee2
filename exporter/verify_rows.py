"""The parity gate of graphs that run whole rows: padded on either side, alone, and at positions of the caller's.

Every output is compared with transformers on the same batch, at every real token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.checkpoint import Checkpoint
from exporter.evaluate.rounded import weights_of
from exporter.evaluate.rows import Runner, evaluate_graph_rows, evaluate_network_rows, onnxruntime_rows
from exporter.reference import Batch, Reference
from exporter.scaling import Scaling
from exporter.tasks import GENERATION, TASKS
from exporter.yardstick import Ledger, Outputs, Yardstick, compare
from runtime.bundle import Bundle
from runtime.contract import (
    ATTENTION_MASK,
    EMBED_TOKENS,
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_INDICES,
    LOGITS_TO_KEEP,
    POSITION_IDS,
    attentions_name,
    hidden_states_name,
    past_names,
)
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden, GoldenStep
from runtime.golden_forward import ForwardCase, GoldenForward, real_tokens
from runtime.measured import Comparison, Parity
from runtime.session import Floats, Ints
from runtime.tokenizer import Tokenizer

NON_FINITE = "non_finite"  # the metric of an evaluation's edges that are none
SENTENCE = "The solar system consists of the Sun and the planets, moons, comets and asteroids that orbit it."
RIGHT, LEFT, ALONE, GIVEN = "padded right", "padded left", "one long row", "given positions"
LONG_ROW = 64  # tokens at most: attention of whole rows is quadratic
GOLDEN_NUMBERS = 100_000  # of one output of a golden case, at most, where its rows can be cut

Array = NDArray[Any]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class GateResult:
    """What the gate compared, and the golden cases for the bundle; none where its graph did not run."""

    parity: Parity
    golden: Golden | GoldenForward | None


def run_rows_gate(
    bundle: Bundle, checkpoint: Checkpoint, progress: Progress = lambda *_: None, *, network: bool = False
) -> GateResult:
    """Run every case on the bundle's graph, or on what TensorRT's parser makes of it, and compare with transformers.

    Raises:
        UserError: bundle and checkpoint are not of one model, or no TensorRT is installed.
    """
    manifest = bundle.manifest
    runner = _runner(bundle, network)
    cases = _cases(bundle, checkpoint)
    scaling = Scaling.load(bundle.path, checkpoint.spec)
    reference = Reference(checkpoint, manifest.task, weights_of(bundle, scaling))
    expected = Yardstick(reference, manifest.activations).outputs(list(cases.values()))
    ledger = Ledger(manifest.activations, over_vocabulary=manifest.task == GENERATION)
    for done, ((case, batch), (exact, yardstick)) in enumerate(zip(cases.items(), expected, strict=True)):
        columns = _columns(bundle, batch)
        try:
            outputs = runner.run(_feeds(bundle, batch, columns))
        except CheckFailed as refusal:  # the graph is so wrong that the backend does not run it
            return GateResult(refused(runner.name, case, refusal), None)
        for name, ours in outputs.items():
            if name not in exact:
                continue  # of the cache, which the steps compare
            wanted = [_comparable(name, side[name], columns, manifest.task) for side in (exact, yardstick)]
            if ours.shape != wanted[0].shape:
                raise UserError(
                    f"{bundle.path} and {checkpoint.path} are not of one model: {name} has shape {ours.shape}, "
                    f"transformers gives {wanted[0].shape}; give the checkpoint that the bundle was made from"
                )
            real = _real(name, batch, columns, manifest.task, ours.shape)
            ledger.note(name.partition(".")[0], case, ours[real], *(side[real] for side in wanted))
        progress("verify", done + 1, len(cases))
    comparisons = (*(non_finite(runner.non_finite) if runner.evaluates else []), *ledger.comparisons())
    parity = Parity(
        evaluated_by=runner.name,
        passed=all(comparison.passed for comparison in comparisons),
        comparisons=comparisons,
    )
    return GateResult(parity, _golden(bundle, cases, [exact for exact, _ in expected], comparisons))


def refused(evaluated_by: str, case: str, refusal: CheckFailed) -> Parity:
    """The verdict on a graph that does not run."""
    comparison = replace(compare("graph", case, "refused", np.nan, 0.0), extra={"reason": str(refusal)})
    return Parity(evaluated_by=evaluated_by, passed=False, comparisons=(comparison,))


def has_extras(bundle: Bundle) -> bool:
    """Whether a graph with a cache takes or gives what steps alone do not show."""
    graph = bundle.manifest.graph
    names = {spec.name for spec in (*graph.inputs, *graph.outputs)}
    return bool(names & {POSITION_IDS, hidden_states_name(0), attentions_name(0)})


def non_finite(edges: Sequence[str]) -> list[Comparison]:
    """Of an evaluation: how many edges were not finite, under the name of the first of them."""
    return [compare(edges[0] if edges else "edges", "all", NON_FINITE, float(len(edges)), 0.0)]


def whole_row_logits(bundle: Bundle) -> Callable[[Ints], Floats]:
    """Of a text-generation graph without a cache, evaluated: tokens int64 [1, n] to logits float32 [n, vocab]."""
    runner = _runner(bundle, network=False)

    def logits(tokens: Ints) -> Floats:
        batch = Batch(tokens, np.ones_like(tokens))
        found: Floats = runner.run(_feeds(bundle, batch, _columns(bundle, batch)))[LOGITS][0]
        return found

    return logits


def prompts(bundle: Bundle) -> list[list[int]]:
    """One row of text and two of random token ids, of equal length."""
    text = Tokenizer(bundle).encode(SENTENCE)[:24]
    random = np.random.default_rng(0).integers(bundle.vocab_size, size=(2, max(len(text), 8)))
    return [text, *random.tolist()]


def _runner(bundle: Bundle, network: bool) -> Runner:
    if network:
        return evaluate_network_rows(bundle)
    return onnxruntime_rows(bundle) if bundle.manifest.precision == "fp32" else evaluate_graph_rows(bundle)


def _cases(bundle: Bundle, checkpoint: Checkpoint) -> dict[str, Batch]:
    """Batches by name, each within the bundle's length; a cache takes padding on the right alone."""
    limit, vocabulary = bundle.manifest.max_length, bundle.vocab_size
    pad = checkpoint.spec.pad_token
    texts = prompts(bundle)
    longest = min(limit, max(map(len, texts)))
    lengths = [longest, max(1, longest // 3), max(1, 2 * longest // 3)]
    rows = [_unpadded(row[:length], pad, vocabulary) for row, length in zip(texts, lengths, strict=True)]
    cases = {RIGHT: _batch(rows, pad or 0, left=False)}
    if not bundle.has_cache:
        cases[LEFT] = _batch(rows, pad or 0, left=True)
        long = np.random.default_rng(2).integers(vocabulary, size=min(limit, LONG_ROW)).tolist()
        cases[ALONE] = _batch([_unpadded(long, pad, vocabulary)], 0, left=False)
    if any(spec.name == POSITION_IDS for spec in bundle.manifest.graph.inputs):
        given = cases[RIGHT]
        steps = np.random.default_rng(3).integers(1, 3, size=given.input_ids.shape).cumsum(1)
        cases[GIVEN] = Batch(given.input_ids, given.attention_mask, np.minimum(steps, limit - 1))
    return cases


def _unpadded(row: Sequence[int], pad: int | None, vocabulary: int) -> list[int]:
    """The row without the token that would pass for padding."""
    return [(token + 1) % vocabulary if token == pad else token for token in row]


def _batch(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> Batch:
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), pad, np.int64), np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(len(row))
        ids[index, place], mask[index, place] = row, 1
    return Batch(ids, mask)


def _columns(bundle: Bundle, batch: Batch) -> Ints:
    """The columns whose logits text generation is asked for, int64 [batch, sequence]: all, or counted from the last."""
    sequence = batch.input_ids.shape[1]
    every = np.tile(np.arange(sequence), (len(batch.input_ids), 1))
    if bundle.manifest.target == "tensorrt":
        return every
    last = (every * (batch.attention_mask != 0)).max(1)
    columns: Ints = np.maximum(last[:, None] + np.arange(1 - sequence, 1), 0)
    return columns


def _feeds(bundle: Bundle, batch: Batch, columns: Ints) -> dict[str, Array]:
    """What the graph takes, by its own inputs."""
    sequence = columns.shape[1]
    positions = (
        batch.position_ids if batch.position_ids is not None else np.tile(np.arange(sequence), (len(columns), 1))
    )
    makes: dict[str, Callable[[], Array]] = {
        INPUT_IDS: lambda: batch.input_ids,
        INPUTS_EMBEDS: lambda: np.load(bundle.file(EMBED_TOKENS), mmap_mode="r")[batch.input_ids],
        ATTENTION_MASK: lambda: batch.attention_mask,
        POSITION_IDS: lambda: positions,
        LOGITS_TO_KEEP: lambda: np.array([sequence]),
        LOGITS_INDICES: lambda: columns,
    }
    if bundle.has_cache:
        geometry = bundle.cache_geometry
        empty = np.zeros((len(columns), geometry.kv_heads, 0, geometry.head_dim), geometry.dtype)
        makes |= {name: lambda: empty for layer in range(geometry.layers) for name in past_names(layer)}
    return {spec.name: makes[spec.name]() for spec in bundle.manifest.graph.inputs}


def _comparable(name: str, array: Array, columns: Ints, task: str) -> Array:
    """transformers' output as the graph hands it out: of text generation, logits of the columns asked for."""
    return np.take_along_axis(array, columns[..., None], 1) if (name, task) == (LOGITS, GENERATION) else array


def _real(name: str, batch: Batch, columns: Ints, task: str, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which leading part of an output is of real tokens."""
    real: NDArray[np.bool_] = batch.attention_mask != 0
    if (name, task) == (LOGITS, GENERATION):
        return np.take_along_axis(real, columns, 1)
    return real_tokens(name, shape, real)


def _golden(
    bundle: Bundle, cases: Mapping[str, Batch], exact: Sequence[Outputs], comparisons: Sequence[Comparison]
) -> Golden | GoldenForward | None:
    """The reference's own outputs: whole for a head, as steps for text generation."""
    task = bundle.manifest.task
    limits = {found.name: found.limit for found in comparisons if found.metric == "max_abs"}
    if task == GENERATION:
        return None if bundle.has_cache else _golden_steps(cases[RIGHT], exact[0][LOGITS], limits[LOGITS])
    names = TASKS[task].outputs
    kept = [
        _golden_case(case, batch, {name: found[name] for name in names})
        for (case, batch), found in zip(cases.items(), exact, strict=True)
        if case in (RIGHT, LEFT)
    ]
    return GoldenForward(limit={name: limits[name] for name in names}, cases=kept)


def _golden_case(case: str, batch: Batch, outputs: Outputs) -> ForwardCase:
    """A batch and its outputs; of wide ones as many columns as fit, which causality makes the same in a shorter row."""
    width = batch.input_ids.shape[1]
    for array in outputs.values():
        if array.ndim == 3:
            width = min(width, max(1, GOLDEN_NUMBERS // array[:, 0].size))
    mask = batch.attention_mask[:, :width]
    rows = mask.any(1)  # one that is padded on the left may have nothing in these columns
    return ForwardCase(
        case=case,
        input_ids=batch.input_ids[rows, :width],
        attention_mask=mask[rows],
        outputs={
            name: (array[rows, :width] if array.ndim == 3 else array[rows]).astype(np.float32)
            for name, array in outputs.items()
        },
    )


def _golden_steps(batch: Batch, logits: Array, limit: float) -> Golden:
    """A prefill of two thirds of each row, and the rest of the rows token by token."""
    lengths = batch.attention_mask.sum(1)
    slots = np.arange(len(lengths))
    first = np.maximum(2 * lengths // 3, 1)
    steps = []
    past = np.zeros_like(lengths)
    counts = [first, *([np.ones_like(lengths)] * int((lengths - first).min()))]
    for count in counts:
        width = int(count.max())
        tokens = np.stack([np.resize(batch.input_ids[row, past[row] : past[row] + count[row]], width) for row in slots])
        last = np.take_along_axis(logits, (past + count - 1)[:, None, None], 1)
        steps.append(
            GoldenStep.record(
                "prefill" if not past.any() else "decode",
                tokens=tokens,
                lengths=count,
                past_lengths=past,
                slots=slots,
                logits=last.astype(np.float32),
            )
        )
        past = past + count
    return Golden(slots=len(slots), capacity=int(lengths.max()), limit=limit, steps=steps)
