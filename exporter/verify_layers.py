"""The parity gate in bounded memory: the graph and transformers go through the model side by side, layer by layer.

The steps are those of `exporter.verify`, but for their tokens, which must be known from the start. After each layer its
residual stream and its cache are compared, so that a difference has a place; after the last one the logits, for which
the head's matrix is read in slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from exporter.checkpoint import Checkpoint
from exporter.engine_options import NATIVE, PLUGIN
from exporter.evaluate.rounded import weights_of
from exporter.evaluate.segments import Segments
from exporter.evaluate.session import WITH_OPS, graph_of
from exporter.golden_limit import rounds_activations, with_kernels_error, with_ties_turned
from exporter.layered_reference import LayeredReference, Pairs, Weights
from exporter.layered_steps import LayeredSteps, all_logits
from exporter.memory import release
from exporter.parameters import HEAD
from exporter.reference import Forward, Row
from exporter.rounded_cache import CacheView
from exporter.scaling import Scaling
from exporter.verdict import Verdict, golden_steps, note_logits
from exporter.verify_rows import GateResult, non_finite, prompts, refused
from exporter.verify_steps import DECODE_STEPS, END, Request, Step, capacity_of, end_of_capacity, requests, seed
from exporter.yardstick import HIDDEN_STATES, YARDSTICKS, Expected, Ledger
from runtime.bundle import Bundle
from runtime.cache_scales import CacheScales
from runtime.errors import CheckFailed
from runtime.golden import Golden
from runtime.session import Floats

Progress = Callable[[str, int, int], None]

LOGITS_BYTES = 1 << 25  # of single tokens' logits, of one side
LEAST_DECODE_STEPS = 4


def run_layered_gate(
    bundle: Bundle, checkpoint: Checkpoint, progress: Progress = lambda *_: None, attention: str = NATIVE
) -> GateResult:
    """Compare a bundle that has a cache with its checkpoint, one layer of either in memory at a time."""
    gate = _LayeredGate(bundle, checkpoint, attention)
    layers = bundle.cache_geometry.layers
    try:
        for layer in range(layers):
            progress("verify", layer, layers + 1)
            gate.advance(layer)
            release()
        progress("verify", layers, layers + 1)
        return gate.finish()
    except CheckFailed as refusal:  # the graph is so wrong that the backend does not run it
        return GateResult(refused(gate.evaluated_by, "all", refusal), None)


@dataclass
class _Reference:
    """The rows through transformers in one dtype.

    Attributes:
        rows: on their way.
        ties_turned: near ties of a rounded cache go the other way.
        logits: of each row float32 [tokens, vocab], in the end.
    """

    rows: LayeredReference
    ties_turned: bool = False
    logits: list[Floats] = field(default_factory=list)

    def advance(self, stored: dict[str, torch.Tensor], rows: Sequence[Row], scales: CacheScales | None) -> Pairs:
        """Run a layer."""
        if self.ties_turned:
            rows = [replace(row, kept=[], ties_turned=True) for row in rows]
        return self.rows.advance(stored, rows, scales)

    def begin_head(self, vocab: int) -> None:
        """Make room for logits."""
        self._normed = self.rows.finish()
        self.logits = [np.empty((len(normed), vocab), np.float32) for normed in self._normed]

    def run_head(self, matrix: torch.Tensor, part: slice) -> None:
        """Logits of some tokens of the vocabulary."""
        for normed, logits in zip(self._normed, self.logits, strict=True):
            logits[:, part] = self.rows.logits(normed, matrix).float().numpy()

    def forwards(self) -> list[Forward]:
        """The logits, as the whole model's forward passes give them; keys and values have been compared."""
        nothing = np.empty(0)
        return [Forward(logits, nothing, nothing) for logits in self.logits]


class _LayeredGate:
    """Both sides as far as layers have run: unequal rows, and one that ends its capacity."""

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, attention: str) -> None:
        self._bundle, self._hidden = bundle, checkpoint.spec.hidden
        scaling = Scaling.load(bundle.path, checkpoint.spec)
        self._view = CacheView(bundle, scaling)
        self._weights = Weights(checkpoint, weights_of(bundle, scaling))
        asked, self._rows = _script(bundle)
        end, self._random = end_of_capacity(bundle)
        self._past = int(end[0].past[0])
        capacity, longest = capacity_of(prompts(bundle), bundle.manifest.max_length), bundle.manifest.max_length

        # The kernels' ops are evaluated whatever the precision.
        evaluate = attention == PLUGIN or bundle.manifest.precision != "fp32"
        self._segments = Segments(bundle, evaluate=evaluate, model=graph_of(bundle, attention))
        self._steps = LayeredSteps(bundle, self._segments, asked, slots=len(self._rows), capacity=capacity)
        self._last = LayeredSteps(bundle, self._segments, end, slots=1, capacity=longest)
        self._kernels = None
        if rounds_activations(bundle):  # the same steps as ONNX Runtime computes them
            self._products = Segments(bundle, evaluate=False)
            self._kernels = LayeredSteps(bundle, self._products, asked, slots=len(self._rows), capacity=capacity)
        self.evaluated_by = f"{self._segments.name}{WITH_OPS[attention]}, layer by layer"

        precision = bundle.manifest.activations
        every = [*self._rows, [int(token) for request in end for token in request.tokens[0]]]

        def reference(dtype: torch.dtype, *, ties_turned: bool = False) -> _Reference:
            return _Reference(LayeredReference(checkpoint, self._weights, every, dtype), ties_turned)

        self._exact = reference(torch.float32)
        # Where transformers in fp16 is not finite, bf16 is the yardstick.
        dtypes = [YARDSTICKS[precision], *([torch.bfloat16] if precision == "fp16" else [])]
        self._yardsticks = [(reference(dtype), Ledger(precision)) for dtype in dtypes]
        self._ties = self._view.scales is not None and precision == "fp32"  # in 16 bit the yardstick shows their cost
        self._turned = reference(torch.float32, ties_turned=True) if self._ties else None

    def advance(self, layer: int) -> None:
        """Run a layer of either side, and compare."""
        ours, past = self._run_ours(layer)
        release()
        kept = [[pair] if self._ties else [] for pair in ours]
        rows = [*(Row([], kept=own) for own in kept[:-1]), Row([], past=[past], kept=kept[-1])]
        scales = self._view.scales
        if scales is not None:
            scales = CacheScales(scales.keys[layer : layer + 1], scales.values[layer : layer + 1])
        stored = self._weights.layer(layer, self._exact.rows.parameter_names)
        exact = self._exact.advance(stored, rows, scales)
        if self._turned is not None:
            self._turned.advance(stored, rows, scales)
        cases = ["decode"] * len(self._rows) + [END]
        streams = [*self._steps.hidden(), *self._last.hidden()]
        for yardstick, ledger in self._yardsticks:
            other = yardstick.advance(stored, rows, scales)
            for case, *pairs in zip(cases, ours, exact, other, strict=True):
                for tensors in zip(*pairs, strict=True):
                    ledger.note("present", case, *tensors)
            for stream, right, near in zip(streams, self._exact.rows.hidden, yardstick.rows.hidden, strict=True):
                ledger.note(HIDDEN_STATES, f"layer {layer}", stream, right.double().numpy(), near.double().numpy())

    def _run_ours(self, layer: int) -> tuple[Pairs, tuple[Floats, Floats]]:
        """What the bundle caches of each row's tokens, and what was cached ahead of the last row's."""
        if self._kernels is not None:
            self._kernels.advance(self._products.layer(layer), layer, self._kernels.cache(layer))
        cache, end = self._steps.cache(layer), self._last.cache(layer)
        past = seed(self._view.of(end), layer, self._random, end.shape, self._past)
        segment = self._segments.layer(layer)
        self._steps.advance(segment, layer, cache)
        self._last.advance(segment, layer, end)
        keys, values = self._view.of(cache).read(layer)
        found = [(keys[slot, :, : len(row)], values[slot, :, : len(row)]) for slot, row in enumerate(self._rows)]
        key, value = self._view.of(end).read(layer)
        # Copies: a view would keep the whole capacity.
        return [*found, (key[0, :, self._past :].copy(), value[0, :, self._past :].copy())], past

    def finish(self) -> GateResult:
        """Run the head of either side, and compare logits."""
        steps, last = self._run_head()
        exact = self._exact.forwards()
        found = [(yardstick.forwards(), ledger) for yardstick, ledger in self._yardsticks]
        finite = (pair for pair in found if all(forward.finite for forward in pair[0]))
        forwards, ledger = next(finite, found[-1])
        expected = [Expected(*pair) for pair in zip(exact, forwards, strict=True)]
        note_logits(ledger, steps, expected[:-1])
        ledger.add("logits", END, np.concatenate(last), expected[-1], lambda forward: forward.logits)
        edges = non_finite(self._segments.non_finite) if self._segments.evaluated else []
        verdict = Verdict(steps, expected[:-1], ledger, edges)
        if self._turned is not None:
            turned = zip(self._turned.forwards()[:-1], exact, strict=False)
            most = max(float(np.abs(other.logits - own.logits).max()) for other, own in turned)
            verdict.allow(*with_ties_turned(verdict.golden, most))
        if self._kernels is not None:
            verdict.allow(*with_kernels_error(verdict.golden, _kernels_error(verdict.golden, self._run_products())))
        return verdict.result(self.evaluated_by)

    def _run_head(self) -> tuple[list[Step], list[Floats]]:
        """The steps with their logits, and those of the last row; of transformers, in its own place."""
        references = [self._exact, *(yardstick for yardstick, _ in self._yardsticks)]
        references += [self._turned] if self._turned is not None else []
        vocab = self._bundle.vocab_size
        for reference in references:
            reference.begin_head(vocab)
        for part in self._segments.vocabulary(self._hidden):
            matrix = self._weights.read(HEAD, part)
            for reference in references:
                reference.run_head(matrix, part)
        steps, last = all_logits(vocab, self._segments.head(self._hidden), self._steps, self._last)
        answered = [asked.answered(logits) for asked, logits in zip(self._steps.requests, steps, strict=True)]
        return answered, [logits[0] for logits in last]

    def _run_products(self) -> list[Step]:
        """The steps as ONNX Runtime's products give them."""
        assert self._kernels is not None
        (logits,) = all_logits(self._bundle.vocab_size, self._products.head(self._hidden), self._kernels)
        return [asked.answered(own) for asked, own in zip(self._kernels.requests, logits, strict=True)]


def _kernels_error(golden: Golden, steps: Sequence[Step]) -> float:
    """How far steps are from the golden cases' logits."""
    pairs = zip(golden.steps, golden_steps(steps), strict=True)
    return max(
        float(np.abs(np.take_along_axis(step.logits, case.top_ids, -1) - case.top_logits).max()) for case, step in pairs
    )


def _script(bundle: Bundle) -> tuple[list[Request], list[list[int]]]:
    """The gate's steps with random tokens in place of the likeliest, and the rows that they make."""
    random, vocab = np.random.default_rng(4), bundle.vocab_size
    starts = prompts(bundle)
    fit = LOGITS_BYTES // (4 * vocab * len(starts))
    asked = requests(starts, bundle.manifest.max_length, min(DECODE_STEPS, max(LEAST_DECODE_STEPS, fit)))
    steps = [next(asked)]
    while True:
        try:
            steps.append(asked.send(random.integers(vocab, size=len(steps[-1].slots)).tolist()))
        except StopIteration as done:
            return steps, done.value
