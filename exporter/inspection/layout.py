"""Where the boxes of a small directed graph lie: ranks from top to bottom, few crossings, edges as straight as they go.

The usual steps of a layered drawing (Sugiyama, Tagawa, Toda 1981): longest-path ranks, placeholders where an edge
passes a rank, orders by the mean of the neighbours, then places as near to the neighbours as widths allow.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

_SWEEPS = 12
_LIGHT = 1e-9  # of a box, how much an edge counts that only passes a rank: it goes round the boxes, not they round it


@dataclass(frozen=True)
class Placed:
    """The result, in the boxes' units.

    Attributes:
        centre: of each box, x and the y of its top edge.
        routes: of each edge, the points from its source's lower edge to its target's upper one.
        width, height: of everything.
    """

    centre: dict[str, tuple[float, float]]
    routes: dict[tuple[str, str], list[tuple[float, float]]]
    width: float
    height: float


@dataclass
class _Stack:
    """Ranks of boxes and placeholders, with the neighbours of each above and below it."""

    ranks: list[list[Hashable]]
    above: dict[Hashable, list[Hashable]] = field(default_factory=dict)
    below: dict[Hashable, list[Hashable]] = field(default_factory=dict)

    def join(self, upper: Hashable, lower: Hashable) -> None:
        self.below.setdefault(upper, []).append(lower)
        self.above.setdefault(lower, []).append(upper)


def place(
    sizes: Mapping[str, tuple[float, float]],
    edges: Iterable[tuple[str, str]],
    gap: tuple[float, float],
    passing: float,
) -> Placed:
    """Lay out a graph without cycles.

    Args:
        sizes: width and height of each box.
        edges: from and to, each once.
        gap: between boxes of a rank, and between ranks.
        passing: the width that an edge takes where it passes a rank.
    """
    edges = list(edges)
    ranks = _ranks(list(sizes), edges)
    stack, chains = _stack(ranks, edges)
    _order(stack)
    widths = {item: sizes[item][0] if isinstance(item, str) else passing for row in stack.ranks for item in row}
    across = _across(stack, widths, gap[0])
    _straighten(stack, chains.values(), across, widths, gap[0])
    left = min(across[item] - widths[item] / 2 for item in across)
    across = {item: x - left for item, x in across.items()}
    tops, bottoms, y = [], [], 0.0
    for row in stack.ranks:
        tops.append(y)
        bottoms.append(y + max(sizes[item][1] for item in row if isinstance(item, str)))
        y = bottoms[-1] + gap[1]
    routes = {}
    for source, target in edges:
        points = [(across[source], tops[ranks[source]] + sizes[source][1])]
        for at, item in enumerate(chains[source, target], ranks[source] + 1):
            points += [(across[item], tops[at]), (across[item], bottoms[at])]
        routes[source, target] = [*points, (across[target], tops[ranks[target]])]
    centre = {name: (across[name], tops[ranks[name]]) for name in sizes}
    return Placed(centre, routes, max(across[item] + widths[item] / 2 for item in across), bottoms[-1])


def _ranks(names: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The longest path to each box; one that nothing leads to stands right above the first that it leads to."""
    ranks = dict.fromkeys(names, 0)
    changed = True
    while changed:
        changed = False
        for source, target in edges:
            if ranks[target] <= ranks[source]:
                ranks[target], changed = ranks[source] + 1, True
    for name in names:
        targets = [ranks[target] for source, target in edges if source == name]
        if targets and all(target != name for _, target in edges):
            ranks[name] = min(targets) - 1
    used = sorted(set(ranks.values()))
    return {name: used.index(rank) for name, rank in ranks.items()}


def _stack(
    ranks: Mapping[str, int], edges: Sequence[tuple[str, str]]
) -> tuple[_Stack, dict[tuple[str, str], list[Hashable]]]:
    """Boxes and placeholders by rank, and the placeholders of each edge."""
    stack = _Stack([[] for _ in range(1 + max(ranks.values()))])
    for name, rank in ranks.items():
        stack.ranks[rank].append(name)
    chains: dict[tuple[str, str], list[Hashable]] = {}
    for source, target in edges:
        chain: list[Hashable] = [(source, target, rank) for rank in range(ranks[source] + 1, ranks[target])]
        for rank, item in enumerate(chain, ranks[source] + 1):
            stack.ranks[rank].append(item)
        for upper, lower in pairwise([source, *chain, target]):
            stack.join(upper, lower)
        chains[source, target] = chain
    return stack, chains


def _order(stack: _Stack) -> None:
    """Sort each rank by where its neighbours stand, down and up in turn."""
    for sweep in range(_SWEEPS):
        neighbours = stack.below if sweep % 2 else stack.above
        rows = reversed(stack.ranks) if sweep % 2 else iter(stack.ranks)
        for row in rows:
            at = {item: place / max(1, len(other) - 1) for other in stack.ranks for place, item in enumerate(other)}
            row.sort(key=lambda item: _mean([at[other] for other in neighbours.get(item, ())], at[item]))


def _across(stack: _Stack, widths: Mapping[Hashable, float], gap: float) -> dict[Hashable, float]:
    """x of each centre: up and down in turn, as near to the mean of the rank before as order and widths allow.

    Down comes last: what one box alone leads to stands right below it.
    """
    x: dict[Hashable, float] = dict.fromkeys(widths, 0.0)
    for sweep in range(_SWEEPS):
        nearer, farther = (stack.above, stack.below) if sweep % 2 else (stack.below, stack.above)
        for row in stack.ranks if sweep % 2 else reversed(stack.ranks):
            wanted = []
            for item in row:
                others = nearer.get(item) or farther.get(item, [])
                # An edge that passes must not pull at a box: it lies where the boxes leave room.
                boxes = [other for other in others if isinstance(other, str)]
                wanted.append(_mean([x[other] for other in boxes or others], x[item]))
            found = _apart(wanted, [widths[item] for item in row], [_weight(item) for item in row], gap)
            x.update(zip(row, found, strict=True))
    return x


def _straighten(
    stack: _Stack,
    chains: Iterable[Sequence[Hashable]],
    across: dict[Hashable, float],
    widths: Mapping[Hashable, float],
    gap: float,
) -> None:
    """Let an edge pass all its ranks at one x, where there is one that is free in each."""
    beside: dict[Hashable, tuple[Hashable | None, Hashable | None]] = {}
    for row in stack.ranks:
        beside |= {
            item: (left, right) for left, item, right in zip([None, *row[:-1]], row, [*row[1:], None], strict=True)
        }
    for chain in chains:
        left, right = -math.inf, math.inf
        for item in chain:
            before, after = beside[item]
            if before is not None:
                left = max(left, across[before] + (widths[before] + widths[item]) / 2 + gap)
            if after is not None:
                right = min(right, across[after] - (widths[after] + widths[item]) / 2 - gap)
        if chain and left <= right:
            middle = sum(across[item] for item in chain) / len(chain)
            across.update(dict.fromkeys(chain, min(max(middle, left), right)))


def _apart(wanted: Sequence[float], widths: Sequence[float], weights: Sequence[float], gap: float) -> list[float]:
    """The places nearest to those wanted, by squares, that keep the order and the widths' distance (pool adjacent)."""
    offsets, at = [], 0.0
    for index, width in enumerate(widths):
        at += (widths[index - 1] + width) / 2 + gap if index else 0.0
        offsets.append(at)
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many
    for want, offset, weight in zip(wanted, offsets, weights, strict=True):
        pool = (want - offset, weight, 1)
        while pools and pools[-1][0] >= pool[0]:
            mean, more, count = pools.pop()
            total = pool[1] + more
            pool = ((pool[0] * pool[1] + mean * more) / total, total, pool[2] + count)
        pools.append(pool)
    bases = [mean for mean, _, count in pools for _ in range(count)]
    return [base + offset for base, offset in zip(bases, offsets, strict=True)]


def _weight(item: Hashable) -> float:
    return 1.0 if isinstance(item, str) else _LIGHT


def _mean(values: Sequence[float], default: float) -> float:
    return sum(values) / len(values) if values else default
