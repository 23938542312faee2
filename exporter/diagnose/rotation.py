"""Hypotheses about rotation: which channels turn, in which pairs, by which base, and at which positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from exporter.diagnose import taps
from exporter.diagnose.cause import HEADS, MASK, ROTARY, ROTARY_PAIRS, ROTARY_THETA, ROTARY_WIDTH, Hypothesis, Place
from exporter.diagnose.ours import Taps

Tensor = torch.Tensor

USUAL_BASES = (1e4, 1e5, 5e5, 1e6, 1e7)
LEAST_ANGLE = 0.02  # radians that say something about a base


def of_rotation(place: Place, _tap: str) -> Iterator[Hypothesis]:
    """What the rotation of queries and keys may have become."""
    own, factor = place.frequencies
    width = 2 * len(own)
    if taps.Q not in place.ours or taps.K not in place.ours:
        return
    positions = torch.arange(len(place.ours[taps.Q]), dtype=torch.float64)

    def guess(
        cause: str, text: str, frequencies: Tensor, at: Tensor = positions, *, paired: bool = False
    ) -> Hypothesis:
        return Hypothesis(cause, text, _rotated(place, frequencies, at, factor, paired=paired))

    rope: dict[str, Any] = dict(place.spec.config.rope_parameters or {})
    base = float(rope["rope_theta"])
    for other in _bases(place, width):
        text = f"theta is {other:.4g} where rope_theta is {base:.4g}"
        yield guess(ROTARY_THETA, text, powers(other, width))
    for other in range(2, place.spec.head_dim + 1, 2):
        if other != width:
            text = f"{other} channels of a head rotate where {width} should"
            yield guess(ROTARY_WIDTH, text, powers(base, other))
    text = "neighbouring channels rotate as pairs (interleaved), not those half a width apart"
    yield guess(ROTARY_PAIRS, text, own, paired=True)
    yield guess(ROTARY, "queries and keys are not rotated", 0 * own)
    yield guess(ROTARY, "it rotates backwards: the sine's sign is turned", -own)
    for shift in (-1, 1):
        yield guess(ROTARY, f"positions are off by {shift:+d}", own, positions + shift)
    past = torch.tensor([float(start > 0) for start, count in place.steps for _ in range(count)], dtype=torch.float64)
    for shift in (-1, 1):
        text = f"positions of steps with a past are off by {shift:+d}"
        yield guess(MASK, text, own, positions + shift * past)
    yield from _permuted(place)


def powers(base: float, width: int) -> Tensor:
    """Radians per position of each pair of channels: base^(−2i / width)."""
    return torch.tensor(base, dtype=torch.float64) ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)


def rotate(x: Tensor, frequencies: Tensor, positions: Tensor, factor: float = 1.0, *, paired: bool = False) -> Tensor:
    """Rotate the first channels of [tokens, heads, head_dim]; pairs are neighbours, or half the width apart."""
    half = len(frequencies)
    angles = positions[:, None, None] * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    if paired:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    turned = (first * cos - second * sin, second * cos + first * sin)
    both = torch.stack(turned, -1).flatten(-2) if paired else torch.cat(turned, -1)
    return torch.cat([both, x[..., 2 * half :]], -1)


def heads_of(x: Tensor, width: int) -> Tensor:
    """[tokens, heads · head_dim] as [tokens, heads, head_dim]."""
    return x.reshape(len(x), -1, width)


def _rotated(place: Place, frequencies: Tensor, positions: Tensor, factor: float, *, paired: bool) -> Taps:
    query, key = (heads_of(place.ours[tap], place.spec.head_dim) for tap in (taps.Q, taps.K))
    found = {taps.Q_ROTATED: rotate(query, frequencies, positions, factor, paired=paired)}
    if not place.rounded_cache:
        found[taps.K_CACHED] = rotate(key, frequencies, positions, factor, paired=paired)
    return found


def _bases(place: Place, width: int) -> Sequence[float]:
    """Usual ones, and the one that follows from the angles at position 1, to a few digits."""
    tap, turned = (taps.Q, taps.Q_ROTATED) if taps.Q_ROTATED in place.ours else (taps.K, taps.K_CACHED)
    before, after = heads_of(place.ours[tap], place.spec.head_dim), place.ours[turned]
    if len(before) < 2 or not bool(after[1].isfinite().all()):
        return USUAL_BASES
    half = width // 2
    (a, b), (c, d) = ((x[1, :, :half], x[1, :, half:width]) for x in (before, after))
    angles = torch.atan2((a * d - b * c).sum(0), (a * c + b * d).sum(0))
    exponents = torch.arange(half, dtype=torch.float64) / half
    clear = (angles > LEAST_ANGLE) & (exponents > 0)
    if not bool(clear.any()):
        return USUAL_BASES
    x, y = exponents[clear], angles[clear].log()
    weights = angles[clear].square()
    solved = float(torch.exp(-(weights * x * y).sum() / (weights * x * x).sum()))
    return [*USUAL_BASES, *(float(f"{solved:.{digits}g}") for digits in (2, 3, 4, 6))] if solved < 1e12 else USUAL_BASES


def _permuted(place: Place) -> Iterator[Hypothesis]:
    """Cached heads in another order: for each of the bundle's the nearest."""
    for tap in (taps.K_CACHED, taps.V_CACHED):
        ours, exact = (side[tap].transpose(0, 1).flatten(1) for side in (place.ours, place.exact))
        if not bool(ours.isfinite().all()):
            continue
        order = torch.cdist(ours, exact).argmin(1).tolist()
        if sorted(order) == list(range(len(order))) and order != sorted(order):
            text = f"key/value heads are cached in the order {order}"
            yield Hypothesis(HEADS, text, {tap: place.exact[tap][:, order]})
