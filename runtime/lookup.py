"""Speculation without a second model: what followed the last tokens where they stood before is tried again.

A draft is run with the token ahead of it in one step. Every position's token is then chosen as it always is, from that
position's logits, and the draft holds as long as it is what was chosen: the text is that of single steps, for any
sampling (https://arxiv.org/abs/2304.04487 for the idea of copying from the context).
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 3, 2  # tokens that must stand there again
MOST = 16  # tokens of a draft: more gain little where products, not memory, take the time
PATIENCE = 16  # steps of one token after a draft that did not pay, twice as many after each further one
_WEIGHT = 0.2  # of the newest step in the mean of all


class Lookup:
    """A row's tokens by what they followed."""

    def __init__(self, tokens: Sequence[int]) -> None:
        """Index a prompt; about a microsecond a token."""
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}  # n tokens, and where the one behind their last occurrence is
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add the row's next tokens."""
        for token in tokens:
            end = len(self._tokens)
            for width in range(SHORTEST, min(LONGEST, end) + 1):
                self._places[tuple(self._tokens[end - width :])] = end
            self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """At most so many tokens that may come next; none where the last ones are new."""
        for width in range(min(LONGEST, len(self._tokens)), SHORTEST - 1, -1):
            place = self._places.get(tuple(self._tokens[-width:]))
            if place is not None:
                return self._tokens[place : place + most]
        return []


class Pace:
    """How long drafts should be, by what steps took: none for a while, after they have cost more than they gave."""

    def __init__(self) -> None:
        self._single = 0.0  # seconds of a step of one token
        self._most = 4
        self._rest = 0
        self._patience = PATIENCE

    @property
    def most(self) -> int:
        """Tokens that the next draft may have."""
        return 0 if self._rest or not self._single else self._most

    def single(self, seconds: float) -> None:
        """A step of one token took so long."""
        self._rest = max(0, self._rest - 1)
        self._single += (seconds - self._single) * (_WEIGHT if self._single else 1)

    def drafted(self, drafted: int, held: int, seconds: float) -> None:
        """A step with a draft, of which so many tokens held, took so long: `held` + 1 new tokens."""
        if seconds > (held + 1) * self._single:
            self._rest, self._patience = self._patience, min(2 * self._patience, 512)
            self._most = max(2, self._most // 2)
        else:
            self._patience = PATIENCE
            # The next one is twice as long, or half way towards what held.
            self._most = min(2 * self._most, MOST) if held == drafted else max(2, (drafted + held) // 2)
