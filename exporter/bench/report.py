"""What a measurement says: medians and spread, shares of the roofline, and how far ours is ahead of each peer."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.bench.measure import Case, Measured, Taken
from exporter.bench.rounds import leading

StepBytes = Callable[[int, int], int | None]


@dataclass(frozen=True)
class Spread:
    """Of one figure over all rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread | None:
        """Of figures; None of none."""
        return cls(statistics.median(figures), min(figures), max(figures)) if figures else None


@dataclass(frozen=True)
class Ahead:
    """How many times as fast ours was as a peer, by the two turns of a round.

    Attributes:
        first_token: the peer's seconds over ours.
        decode: our tokens per second over the peer's.
        same_tokens: the share of the peer's greedy tokens before the first that is not ours, of all rows and rounds.
    """

    first_token: Spread
    decode: Spread
    same_tokens: float

    @classmethod
    def of(cls, ours: Taken, theirs: Taken) -> Ahead | None:
        """Of a peer in a case; None where it was not measured."""
        first = Spread.of([their / our for our, their in zip(ours.first_token_s, theirs.first_token_s, strict=False)])
        decode = Spread.of([our / their for our, their in zip(ours.tokens_per_s, theirs.tokens_per_s, strict=False)])
        if first is None or decode is None:
            return None
        rows = [
            leading(their, our)
            for our_rows, their_rows in zip(ours.tokens, theirs.tokens, strict=True)
            for our, their in zip(our_rows, their_rows, strict=True)
        ]
        return cls(first, decode, statistics.mean(rows))

    def to_json(self) -> dict[str, Any]:
        """The `ours` of a peer's speed."""
        return {
            "times_as_fast_first_token": vars(self.first_token),
            "times_as_fast_decode": vars(self.decode),
            "same_tokens": self.same_tokens,
        }


@dataclass(frozen=True)
class Speed:
    """What was measured of a contender in a case; figures are None where it cannot do it.

    Attributes:
        case: which.
        first_token_s: seconds from the prompts to every row's first token.
        tokens_per_s: of all rows together, from their second token on.
        step_bytes: that a decoding step reads: the weights, and the cache as long as it is half way through; None
            where nobody can tell.
        roofline: tokens per second if reading them at the bandwidth measured were all there is to do; None where
            the memory that is read was not measured, or it is not known what is read.
        unable: why it cannot do it.
        ahead: ours against it, where it is a peer.
    """

    case: Case
    first_token_s: Spread | None
    tokens_per_s: Spread | None
    step_bytes: int | None
    roofline: float | None
    unable: str | None = None
    ahead: Ahead | None = None

    @property
    def prompt_tokens_per_s(self) -> Spread | None:
        """Of all rows together."""
        if self.first_token_s is None:
            return None
        tokens, first = self.case.batch * self.case.prompt_tokens, self.first_token_s
        return Spread(tokens / first.median, tokens / first.most, tokens / first.least)

    @property
    def share(self) -> float | None:
        """The fraction of the roofline that is reached, 0..1."""
        if self.tokens_per_s is None or self.roofline is None:
            return None
        return self.tokens_per_s.median / self.roofline

    def to_json(self) -> dict[str, Any]:
        """One of the `speeds` of the command `bench`, or of one of its `peers`."""
        figures = {
            name: spread and vars(spread)
            for name in ("first_token_s", "prompt_tokens_per_s", "tokens_per_s")
            for spread in [getattr(self, name)]
        }
        return {
            **vars(self.case),
            **figures,
            "step_bytes": self.step_bytes,
            "roofline_tokens_per_s": self.roofline,
            "roofline_share": self.share,
        }

    def to_peer_json(self) -> dict[str, Any]:
        """The same with what only a peer has."""
        return {**self.to_json(), "unable": self.unable, "ours": self.ahead and self.ahead.to_json()}


def speeds(
    measured: Measured, name: str, new_tokens: int, step_bytes: StepBytes, ours: Mapping[Case, Taken] | None = None
) -> tuple[Speed, ...]:
    """A contender's speeds.

    Args:
        measured: what was.
        name: the contender's.
        new_tokens: of each row.
        step_bytes: of rows with so many tokens in the cache of each.
        ours: to compare a peer with.
    """
    found = []
    for case, taken in measured.taken[name].items():
        read = step_bytes(case.batch, case.prompt_tokens + new_tokens // 2)
        roofline = case.batch * measured.bandwidth / read if measured.bandwidth and read else None
        ahead = None if ours is None else Ahead.of(ours[case], taken)
        first, rate = Spread.of(taken.first_token_s), Spread.of(taken.tokens_per_s)
        found.append(Speed(case, first, rate, read, roofline, taken.unable, ahead))
    return tuple(found)
