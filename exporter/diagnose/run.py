"""The diagnosis of one row: the bundle, transformers beside it, and transformers on the bundle's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import torch

from exporter.checkpoint import Checkpoint
from exporter.diagnose import taps
from exporter.diagnose.attention import of_attention, of_lengths
from exporter.diagnose.blocks import of_activation, of_overflow, of_residual
from exporter.diagnose.cause import Hypothesis, Place, proven
from exporter.diagnose.difference import Difference, difference, limit_of
from exporter.diagnose.head import judge_logits
from exporter.diagnose.norms import of_norm
from exporter.diagnose.ours import BundleRun, Taps
from exporter.diagnose.products import MODULES, constant_factor, of_product
from exporter.diagnose.report import EMBEDDING, FINAL_NORM, Finding, Report, Stage
from exporter.diagnose.rotation import of_rotation
from exporter.diagnose.theirs import TransformersRun
from exporter.evaluate.rounded import weights_of
from exporter.layered_reference import Weights
from exporter.memory import release
from exporter.parameters import BASE
from exporter.reference import Row
from exporter.rounded_cache import CacheView
from exporter.scaling import Scaling
from exporter.verify import check_same_shape
from exporter.yardstick import YARDSTICKS
from runtime.bundle import Bundle
from runtime.cache_scales import CacheScales
from runtime.contract import INPUT_IDS
from runtime.errors import UserError

Tensor = torch.Tensor
Progress = Callable[[str, int, int], None]
Guess = Callable[[Place, str], Iterator[Hypothesis]]

_GUESSES: Mapping[str, tuple[Guess, ...]] = {
    taps.NORM: (of_norm,),
    taps.MLP_NORM: (of_norm,),
    **dict.fromkeys(MODULES, (of_product,)),
    taps.Q_ROTATED: (of_rotation, of_lengths),
    taps.K_CACHED: (of_rotation, of_lengths),
    taps.V_CACHED: (of_rotation, of_lengths),
    taps.CONTEXT: (of_attention, of_lengths),
    taps.MIDDLE: (of_residual,),
    taps.HIDDEN: (of_activation,),
    taps.OUTPUT: (of_residual,),
}
_NORMS = (taps.NORM, taps.MLP_NORM)


def diagnose(
    bundle: Bundle,
    checkpoint: Checkpoint,
    tokens: list[int],
    progress: Progress = lambda *_: None,
    *,
    network: bool = False,
) -> Report:
    """Find where a bundle first differs from transformers, and why.

    Args:
        bundle: of text generation with a cache.
        checkpoint: what it was made from.
        tokens: one row; what few tokens do not show, such as rotation, is not found.
        progress: called with "diagnose", the layers done and their number.
        network: run what TensorRT's parser makes of the graph, instead of the graph.

    Raises:
        UserError: they are not of one model, the row does not fit, or the graph cannot be taken apart.
        CheckFailed: the graph is so wrong that the backend does not run it.
    """
    check(bundle, tokens)
    check_same_shape(bundle, checkpoint)
    return _Diagnosis(bundle, checkpoint, tokens, network=network).run(progress)


def check(bundle: Bundle, tokens: list[int]) -> None:
    """Refuse what cannot be diagnosed, before anything is loaded.

    Raises:
        UserError: a graph without a cache or of embeddings, or tokens that are none of the model's or too many.
    """
    if not bundle.has_cache or INPUT_IDS not in bundle.input_names:
        raise UserError(
            f"{bundle.path}: only graphs of token ids with a cache are taken apart; "
            "use nemotron-export verify, or export it without --no-cache and --inputs embeds"
        )
    limit, vocab = bundle.manifest.max_length, bundle.vocab_size
    if not 0 < len(tokens) <= limit:
        raise UserError(f"the prompt has {len(tokens)} tokens, {bundle.path} holds 1 to {limit}; give another prompt")
    for token in tokens:
        if not 0 <= token < vocab:
            raise UserError(f"token {token} is not within the vocabulary of {bundle.path}, 0…{vocab - 1}; correct it")


@dataclass(frozen=True)
class _Judged:
    """A part of the model on the bundle's own input: its taps, those of transformers, and how far they may differ."""

    ours: Taps
    exact: Taps
    differences: dict[str, Difference]

    @property
    def first(self) -> str | None:
        """The first tap that differs."""
        return next((tap for tap, found in self.differences.items() if not found.passed), None)


class _Diagnosis:
    """Both sides as far as layers have run."""

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, tokens: list[int], *, network: bool) -> None:
        scaling = Scaling.load(bundle.path, checkpoint.spec)
        self._bundle, self._spec, self._tokens = bundle, checkpoint.spec, tokens
        self._weights = Weights(checkpoint, weights_of(bundle, scaling))
        self._scales = CacheView(bundle, scaling).scales
        self._ours = BundleRun(bundle, scaling, tokens, network=network)
        self._precision = bundle.manifest.activations

        def transformers(dtype: torch.dtype) -> TransformersRun:
            return TransformersRun(checkpoint, self._weights, tokens, dtype)

        self._theirs, self._alone = transformers(torch.float32), transformers(torch.float32)
        # Where transformers in fp16 is not finite, bf16 is the yardstick.
        dtypes = [YARDSTICKS[self._precision], *([torch.bfloat16] if self._precision == "fp16" else [])]
        self._yardsticks = [transformers(dtype) for dtype in dtypes]
        self._stages: list[Stage] = []
        self._findings: list[Finding] = []

    def run(self, progress: Progress) -> Report:
        """Everything in order."""
        layers = self._spec.layers
        self._embedding()
        for layer in range(layers):
            progress("diagnose", layer, layers + 1)
            self._layer(layer)
            release()
        progress("diagnose", layers, layers + 1)
        self._head()
        progress("diagnose", layers + 1, layers + 1)
        return Report(self._ours.name, self._tokens, self._stages, self._findings)

    def _embedding(self) -> None:
        ours, exact = self._ours.hidden, self._theirs.hidden
        found = difference(ours, exact, limit_of(exact, self._yardsticks[0].hidden, self._precision))
        self._stages.append(Stage(EMBEDDING, found, found))
        if not found.passed:
            limits = {EMBEDDING: found.limit or 0.0}
            place = self._place(0, {EMBEDDING: ours}, {EMBEDDING: exact}, limits, {})
            proof = proven(constant_factor(ours, exact, EMBEDDING), place, EMBEDDING)
            self._findings.append(Finding(EMBEDDING, None, EMBEDDING, found, {EMBEDDING: found}, proof))

    def _layer(self, layer: int) -> None:
        given = self._ours.hidden
        ours = self._ours.advance(layer)
        stored = self._weights.layer(layer, self._theirs.parameter_names)
        scales = self._scales
        if scales is not None:
            scales = CacheScales(scales.keys[layer : layer + 1], scales.values[layer : layer + 1])
        kept = self._ours.kept if scales is not None and self._precision == "fp32" else None
        row = Row([], kept=[kept] if kept is not None else [])
        self._theirs.advance(stored, row, scales)
        whole = difference(self._ours.hidden, self._theirs.hidden)
        if not bool(given.isfinite().all()):
            self._stages.append(Stage(f"layer {layer}", whole, None))
            return
        judged = self._judge(given, ours, lambda run: run.advance(stored, row, scales))
        self._stages.append(Stage(f"layer {layer}", whole, judged.differences[taps.OUTPUT]))
        self._find(f"layer {layer}", layer, judged, stored)

    def _judge(self, given: Tensor, ours: Taps, run: Callable[[TransformersRun], Taps]) -> _Judged:
        """Give transformers the bundle's input, in fp32 and as the yardstick, and compare every tap."""
        found = []
        for side in (self._alone, *self._yardsticks):
            side.hidden = given
            found.append(run(side))
            if side is not self._alone and all(bool(value.isfinite().all()) for value in found[-1].values()):
                break
        exact, yardstick = found[0], found[-1]
        differences = {}
        for tap in (tap for tap in taps.ORDER if tap in ours and tap in exact):
            wanted = exact[tap].reshape(ours[tap].shape)
            limit = limit_of(wanted, yardstick[tap].reshape(wanted.shape), self._precision, norm=tap in _NORMS)
            differences[tap] = difference(ours[tap], wanted, limit)
        return _Judged({**ours, taps.INPUT: given}, exact, differences)

    def _find(self, name: str, layer: int, judged: _Judged, stored: Mapping[str, Tensor]) -> None:
        tap = judged.first
        if tap is None:
            return
        limits = {key: found.limit or 0.0 for key, found in judged.differences.items()}
        place = self._place(layer, judged.ours, judged.exact, limits, stored)
        guesses = chain.from_iterable(guess(place, tap) for guess in (*_GUESSES[tap], of_overflow))
        proof = proven(guesses, place, tap)
        index = layer if layer < self._spec.layers else None
        shown = judged.differences[tap]
        named = tap if index is not None else name
        self._findings.append(Finding(name, index, named, shown, judged.differences, proof))

    def _place(
        self, layer: int, ours: Taps, exact: Taps, limits: Mapping[str, float], stored: Mapping[str, Tensor]
    ) -> Place:
        dtype = torch.float32 if self._precision == "fp32" else YARDSTICKS[self._precision]
        return Place(
            spec=self._spec,
            layer=layer,
            ours=ours,
            exact=exact,
            limits=limits,
            stored=stored,
            parameters=self._weights,
            steps=self._ours.steps,
            frequencies=self._theirs.frequencies,
            largest=torch.finfo(dtype).max,
            rounded_cache=self._scales is not None,
        )

    def _head(self) -> None:
        """The final norm, and the product with the vocabulary's matrix."""
        given = self._ours.hidden
        normed, logits = self._ours.head()
        whole = difference(normed, self._theirs.final_norm())
        stored = {
            f"input_layernorm.{name}": self._weights.read(f"{BASE}norm.{name}") for name in ("weight", "bias")
        }  # fmt: skip
        if not bool(given.isfinite().all()):
            self._stages.append(Stage(FINAL_NORM, whole, None))
        else:
            judged = self._judge(given, {taps.NORM: normed}, lambda run: {taps.NORM: run.final_norm()})
            self._stages.append(Stage(FINAL_NORM, whole, judged.differences[taps.NORM]))
            self._find(FINAL_NORM, self._spec.layers, judged, stored)
        stage, finding = judge_logits(
            logits, normed, self._theirs, (self._alone, self._yardsticks[0]), self._weights, self._precision
        )
        self._stages.append(stage)
        self._findings += [finding] if finding is not None else []
