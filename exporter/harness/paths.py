"""What a set of scored texts has in common: every token that several begin with is to be computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.session import Ints

RECOMPUTED = 10  # a cache slot of its own is worth this part of the tokens once more


@dataclass(frozen=True)
class Query:
    """Tokens to be scored after others.

    Attributes:
        tokens: what the model reads: context and continuation, without the last token.
        targets: the continuation, which the last positions of `tokens` should predict.
    """

    tokens: list[int]
    targets: list[int]


@dataclass
class Path:
    """A sequence that the model reads, once for all queries that are the same or its beginning.

    Attributes:
        tokens: int64 [length].
        common: how many of its first tokens the path before it has too.
        wanted: by position, from `common` on: the queries that ask for the next token there, and which.
    """

    tokens: Ints
    common: int
    wanted: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    @property
    def new(self) -> int:
        """Tokens that the path before it does not have."""
        return len(self.tokens) - self.common


def lay_out(queries: Sequence[Query]) -> list[Path]:
    """The paths of all queries, sorted, so that those that begin alike are neighbours.

    A token of several queries, with the same tokens before it, belongs to the first path alone, and so does what is
    wanted there.
    """
    paths: list[Path] = []
    owners: list[int] = []  # of each position of the newest path: the path that computes it
    newest: Ints = np.empty(0, np.int64)
    for number in sorted(range(len(queries)), key=lambda number: queries[number].tokens):
        query = queries[number]
        tokens = np.asarray(query.tokens, np.int64)
        common = _common(newest, tokens)
        if common < len(tokens):
            del owners[common:]
            owners += [len(paths)] * (len(tokens) - common)
            paths.append(Path(tokens, common))
            newest = tokens
        for position, target in enumerate(query.targets, len(tokens) - len(query.targets)):
            paths[owners[position]].wanted.setdefault(position, []).append((number, target))
    return paths


def chains(paths: Sequence[Path], count: int) -> list[range]:
    """Cut neighbouring paths into up to `count` runs of about as many tokens, each for a cache slot.

    The first path of a run is computed whole, so one is cut off only where that costs a tenth of the run, or less: the
    choices of one question stay together.
    """
    runs = [range(len(paths))] if paths else []
    while len(runs) < count:
        cuts = [(_tokens(paths, run), run, cut) for run in runs if (cut := _cut(paths, run)) is not None]
        if not cuts:
            break
        _, run, cut = max(cuts, key=lambda found: found[0])
        runs.remove(run)
        runs += [range(run.start, cut), range(cut, run.stop)]
    return sorted(runs, key=lambda run: run.start)


def _cut(paths: Sequence[Path], run: range) -> int | None:
    total = _tokens(paths, run)
    best, done = None, len(paths[run.start].tokens)
    for index in run[1:]:
        allowed = paths[index].common * RECOMPUTED <= total
        if allowed and (best is None or abs(2 * done - total) < best[0]):
            best = (abs(2 * done - total), index)
        done += paths[index].new
    return None if best is None else best[1]


def _tokens(paths: Sequence[Path], run: range) -> int:
    return paths[run.start].common + sum(paths[index].new for index in run)


def _common(one: Ints, other: Ints) -> int:
    most = min(len(one), len(other))
    differ = np.flatnonzero(one[:most] != other[:most])
    return int(differ[0]) if len(differ) else most
