"""Hypotheses about attention: the scale of its scores, which keys a query sees, and which heads belong together."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from exporter.diagnose import taps
from exporter.diagnose.cause import HEADS, MASK, SCALE, Hypothesis, Place
from exporter.diagnose.ours import BEYOND, Taps
from exporter.diagnose.rotation import heads_of, rotate

Tensor = torch.Tensor


def of_attention(place: Place, _tap: str) -> Iterator[Hypothesis]:
    """What the attention of the bundle's own queries, keys and values may have become."""
    if taps.Q_ROTATED not in place.ours:
        return
    own = place.spec.scale
    for other in _scales(place):
        if abs(other / own - 1) > 1e-4:
            text = f"scores are multiplied by {other:.4g} where 1/√head_dim is {own:.4g}"
            yield Hypothesis(SCALE, text, {taps.CONTEXT: _context(place, scale=other)})
    shifts = {1: "one key too many", -1: "one key too few", 2: "two keys too many", -2: "two keys too few"}
    for shift, told in shifts.items():
        text = f"the causal mask is off by {shift:+d}: every query sees {told}"
        yield Hypothesis(MASK, text, {taps.CONTEXT: _context(place, shift=shift)})
    text = "there is no causal mask within a step"
    yield Hypothesis(MASK, text, {taps.CONTEXT: _context(place, shift=len(place.ours[taps.CONTEXT]), padded=False)})
    grouping = _grouping(place)
    if grouping != _right_grouping(place):
        text = f"query heads read the key/value heads {grouping} where they should read {_right_grouping(place)}"
        yield Hypothesis(HEADS, text, {taps.CONTEXT: _context(place, grouping=grouping)})


def of_lengths(place: Place, _tap: str) -> Iterator[Hypothesis]:
    """Rows that are taken to be one key shorter than they are: later steps write over the last key before them."""
    if not {taps.Q, taps.K, taps.V} <= place.ours.keys() or place.rounded_cache:
        return
    text = "the causal mask is off by -1: each row's last valid key is taken to be one earlier"
    yield Hypothesis(MASK, text, _one_shorter(place))


def attend(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float, grouping: list[int]) -> Tensor:
    """Context [queries, heads · head_dim] of q [queries, heads, head_dim] over k, v [keys, kv_heads, head_dim]."""
    scores = torch.einsum("qhd,khd->hqk", query, key[:, grouping]) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value[:, grouping]).flatten(1)


def _right_grouping(place: Place) -> list[int]:
    return [head // (place.spec.heads // place.spec.kv_heads) for head in range(place.spec.heads)]


def _context(
    place: Place,
    *,
    scale: float | None = None,
    shift: int = 0,
    grouping: list[int] | None = None,
    padded: bool = True,
) -> Tensor:
    """Of every step; keys that no step has written yet are zeros, and are not there unless it is padded."""
    found = []
    for start, count in place.steps:
        end = start + count
        beyond = (0, 0, 0, 0, 0, BEYOND if padded and shift > 0 else 0)
        key, value = (
            torch.nn.functional.pad(place.ours[tap][:end], beyond) for tap in (taps.K_CACHED, taps.V_CACHED)
        )  # fmt: skip
        seen = torch.arange(len(key)) <= torch.arange(start, end)[:, None] + shift
        query = place.ours[taps.Q_ROTATED][start:end]
        by = place.spec.scale if scale is None else scale
        found.append(attend(query, key, value, seen, by, grouping or _right_grouping(place)))
    return torch.cat(found)


def _scales(place: Place) -> list[float]:
    """Usual ones, and the one that follows from the second token, whose two weights say how far its scores differ."""
    spec, grouping = place.spec, _right_grouping(place)
    usual = [1.0, 1 / spec.head_dim, spec.hidden**-0.5, (2 * spec.head_dim) ** -0.5, (spec.head_dim // 2 or 1) ** -0.5]
    if len(place.ours[taps.CONTEXT]) < 2:
        return usual
    context = heads_of(place.ours[taps.CONTEXT], spec.head_dim)[1]
    key, value = (place.ours[tap][:2][:, grouping] for tap in (taps.K_CACHED, taps.V_CACHED))
    apart = value[1] - value[0]
    weight = ((context - value[0]) * apart).sum(-1) / apart.square().sum(-1)
    scores = (place.ours[taps.Q_ROTATED][1] * (key[1] - key[0])).sum(-1)
    clear = (weight > 1e-3) & (weight < 1 - 1e-3)
    if not bool(clear.any()):
        return usual
    logits, scores = torch.logit(weight[clear]), scores[clear]
    return [*usual, float(f"{float((logits * scores).sum() / scores.square().sum()):.4g}")]


def _grouping(place: Place) -> list[int]:
    """The key/value head that makes each query head's context, as far as any does."""
    ours = heads_of(place.ours[taps.CONTEXT], place.spec.head_dim)
    apart = []
    for kv_head in range(place.spec.kv_heads):
        context = heads_of(_context(place, grouping=[kv_head] * place.spec.heads), place.spec.head_dim)
        apart.append((ours - context).abs().amax((0, 2)))
    return torch.stack(apart).argmin(0).tolist()


def _one_shorter(place: Place) -> Taps:
    """The last token of a first step counts as padding; later ones stand where the one before them stood."""
    frequencies, factor = place.frequencies
    query, key, value = (heads_of(place.ours[tap], place.spec.head_dim) for tap in (taps.Q, taps.K, taps.V))
    keys, values = torch.zeros_like(key), torch.zeros_like(value)
    context = torch.full((len(query), place.spec.heads * place.spec.head_dim), torch.nan, dtype=torch.float64)
    for start, count in place.steps:
        first = max(start - 1, 0)
        new = slice(start, start + count - (not start))
        at = torch.arange(first, first + new.stop - new.start)
        turned, asked = (rotate(x[new], frequencies, at.double(), factor) for x in (key, query))
        keys[at], values[at] = turned, value[new]
        seen = torch.arange(len(keys)) <= at[:, None]
        context[new] = attend(asked, keys, values, seen, place.spec.scale, _right_grouping(place))
    return {taps.K_CACHED: keys, taps.V_CACHED: values, taps.CONTEXT: context}
