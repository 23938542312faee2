"""A session whose next token is a known function of all the tokens that a slot holds: what is out of place shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

VOCAB = 320
LETTERS = range(3, 97)  # tokens that are one printable character in the toy tokenizer


def next_token(tokens: Sequence[int]) -> int:
    return LETTERS[(sum(tokens) * 31 + len(tokens) * 17) % len(LETTERS)]


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeSession:
    """Keeps each slot's tokens where a cache would be, and refuses what a real session refuses.

    Its slots can be exchanged or not, as backends differ. `widths` has the shape of every step's tokens, `fed` how many
    of them were real.
    """

    backend, version, device, vocab_size = "fake", "1", "none", VOCAB
    choice, max_slots, max_capacity = "", None, 4096

    def __init__(self, slots: int = 4, capacity: int = 64, *, exchanges: bool = True) -> None:
        self.slots, self.capacity, self.exchanges = slots, capacity, exchanges
        self.cached = np.full((slots, capacity), -1)
        self.widths: list[tuple[int, int]] = []
        self.fed = 0

    def next_token(self, tokens: Sequence[int]) -> int:
        return next_token(tokens)

    def reopen(self, *, slots: int, capacity: int) -> Self:
        return type(self)(slots, capacity)

    def copy_prefix(self, source: int, target: int, length: int) -> int:
        assert (self.cached[source, :length] >= 0).all()
        self.cached[target, :length] = self.cached[source, :length]
        return length

    def exchange(self, one: int, other: int, length: int) -> bool:
        if self.exchanges:
            self.cached[[one, other], :length] = self.cached[[other, one], :length]
        return self.exchanges

    def step(self, tokens: Any, lengths: Any, past_lengths: Any, slots: Any = None, keep: int = 1) -> Any:
        self.widths.append(tokens.shape)
        self.fed += int(lengths.sum())
        assert len(set(slots)) == len(slots)
        if tokens.shape[1] > 1 and np.any(past_lengths):
            assert len(tokens) == 1, "GroupQueryAttention takes several tokens behind a past for one row only"
        logits = np.zeros((len(tokens), keep, VOCAB), np.float32)
        for row, slot in enumerate(slots):
            past, new = int(past_lengths[row]), int(lengths[row])
            assert new >= 1
            assert past + new <= self.capacity
            self.cached[slot, past : past + new] = tokens[row, :new]
            for kept in range(min(keep, new)):
                seen = self.cached[slot, : past + new - kept].tolist()
                logits[row, keep - 1 - kept, self.next_token(seen)] = 9
        return logits
