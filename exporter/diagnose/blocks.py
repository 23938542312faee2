"""Hypotheses about what stands between the products: the activation, the residual stream, numbers that overflow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch

from exporter.diagnose import taps
from exporter.diagnose.cause import ACTIVATION, OVERFLOW, RESIDUAL, Hypothesis, Place
from exporter.diagnose.products import constant_factor
from exporter.spec import LEARNED_ACTIVATIONS

Tensor = torch.Tensor

_ADDED = {taps.MIDDLE: (taps.INPUT, taps.ATTENDED), taps.OUTPUT: (taps.MIDDLE, taps.DOWN)}


def of_activation(place: Place, tap: str) -> Iterator[Hypothesis]:
    """Another activation, of those that transformers knows; or the square, or none."""
    if taps.UP not in place.ours:
        return
    from transformers.activations import ACT2FN

    x, own = place.ours[taps.UP], place.spec.activation
    for name in sorted(set(ACT2FN) - {own, *LEARNED_ACTIVATIONS}):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            predicted = ACT2FN[name](x)
        yield Hypothesis(ACTIVATION, f"the activation is {name} where hidden_act is {own}", {tap: predicted})
    for name, predicted in (("x²", x.square()), ("none at all", x)):
        yield Hypothesis(ACTIVATION, f"the activation is {name} where hidden_act is {own}", {tap: predicted})


def of_residual(place: Place, tap: str) -> Iterator[Hypothesis]:
    """One of the two that are added is missing, or another one is there."""
    residual, added = _ADDED[tap]
    if added not in place.ours or residual not in place.ours:
        return
    x, y = place.ours[residual], place.ours[added]
    yield Hypothesis(RESIDUAL, f"the residual stream is not added to the {added}", {tap: y})
    yield Hypothesis(RESIDUAL, f"the {added} is not added to the residual stream", {tap: x})
    yield Hypothesis(RESIDUAL, f"the {added} is subtracted", {tap: x - y})
    for other in (taps.INPUT, taps.NORM, taps.MLP_NORM):
        if other != residual and other in place.ours:
            text = f"the {added} is added to the {other}, not to the residual stream"
            yield Hypothesis(RESIDUAL, text, {tap: place.ours[other] + y})
    yield from constant_factor(place.ours[tap], x + y, tap)


def of_overflow(place: Place, tap: str) -> Iterator[Hypothesis]:
    """What is not finite passes the dtype's largest number, and nothing else differs."""
    exact, ours = place.exact[tap], place.ours[tap]
    over = exact.abs() > place.largest
    if bool(over.any()) and bool((~ours[over].isfinite()).all()):
        text = f"it reaches {float(exact.abs().max()):.4g}, and the largest number of its type is {place.largest:.4g}"
        yield Hypothesis(OVERFLOW, text, {tap: torch.where(over, torch.nan, exact)})
