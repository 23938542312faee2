"""What a hypothesis about a wrong tap is, and which one of several is proven.

A hypothesis says what the bundle would give if it had one certain bug. It is proven where the bundle gives that, within
the limit that right taps are held to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from exporter.diagnose.difference import error
from exporter.diagnose.ours import Taps
from exporter.spec import NemotronSpec

Tensor = torch.Tensor

EPSILON, PLUS_ONE, NORMALISATION = "epsilon", "plus_one_not_folded", "norm"
ROTARY_WIDTH, ROTARY_THETA, ROTARY_PAIRS = "rotary_width", "rotary_theta", "rotary_interleaved"
ROTARY = "rotary"
MASK, HEADS, SCALE = "mask", "head_grouping", "attention_scale"
ACTIVATION, OVERFLOW, LAYER_ORDER, WEIGHT = "activation", "overflow", "layer_order", "weight"
RESIDUAL, CONSTANT = "residual", "constant_factor"


class Parameters(Protocol):
    """Reads the checkpoint's parameters."""

    def layer(self, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Some of a decoder layer's, by their names within it."""
        ...


@dataclass(frozen=True)
class Place:
    """A layer that is wrong by itself, and all that hypotheses are made of.

    Attributes:
        spec: of the model.
        layer: its index; the number of layers for the final norm.
        ours: the bundle's taps, what goes in among them.
        exact: what transformers makes of the same input.
        limits: how far each tap may be, absolute.
        stored: the layer's parameters in the checkpoint.
        parameters: reads other layers'.
        steps: the first position and the number of tokens of each.
        frequencies: radians per position of each pair of channels, and the factor of what is rotated.
        largest: the largest number of the activations' dtype.
        rounded_cache: whether the cache is on a grid, which hypotheses do not round to.
    """

    spec: NemotronSpec
    layer: int
    ours: Taps
    exact: Taps
    limits: Mapping[str, float]
    stored: Mapping[str, Tensor]
    parameters: Parameters
    steps: Sequence[tuple[int, int]]
    frequencies: tuple[Tensor, float]
    largest: float
    rounded_cache: bool = False

    def parameter(self, name: str) -> Tensor | None:
        """One of the layer's parameters, float64."""
        return self.stored[name].double() if name in self.stored else None


@dataclass(frozen=True)
class Hypothesis:
    """One bug, and what the bundle gives if it has it.

    Attributes:
        cause: one of this module's names.
        text: what is wrong, for a person.
        predicted: by tap; what is not a number is not predicted.
    """

    cause: str
    text: str
    predicted: Taps


@dataclass(frozen=True)
class Proof:
    """The hypothesis that holds, and the bundle's error relative to its limit without it and with it."""

    cause: str
    text: str
    before: float
    after: float


def proven(hypotheses: Iterable[Hypothesis], place: Place, tap: str) -> Proof | None:
    """The hypothesis under which the bundle's taps agree best, if they agree; a limit grows with what is predicted."""
    before = error(place.ours[tap], place.exact[tap]) / place.limits[tap]
    agreeing = [(ratio, found) for found in hypotheses if (ratio := _ratio(found, place)) <= 1]
    if not agreeing:
        return None
    after, best = min(agreeing, key=lambda pair: pair[0])
    return Proof(best.cause, best.text, before, after)


def others(place: Place) -> Iterator[int]:
    """The other layers."""
    return (layer for layer in range(place.spec.layers) if layer != place.layer)


def _ratio(hypothesis: Hypothesis, place: Place) -> float:
    """The largest error of what is predicted, relative to its limit."""
    worst = 0.0
    for tap, predicted in hypothesis.predicted.items():
        if tap not in place.ours:
            continue
        ours, known = place.ours[tap].reshape(predicted.shape), predicted.isfinite()
        if not bool(known.any()):
            return float("inf")
        grown = float(predicted[known].abs().max()) / max(float(place.exact[tap].abs().max()), 1e-30)
        worst = max(worst, error(ours[known], predicted[known]) / (place.limits[tap] * max(1.0, grown)))
    return worst
