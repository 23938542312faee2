"""Text generation on a graph without a cache: each step computes its rows anew from their first token on."""

from __future__ import annotations

import copy
from typing import Self

import numpy as np

from runtime.bundle import Bundle
from runtime.contract import LOGITS
from runtime.forward import ForwardSession
from runtime.session import Floats, Ints
from runtime.steps import Limits, check_allocation


class RecomputeSession:
    """The Session over a forward graph: it remembers tokens where others remember keys and values.

    See `runtime.session.Session` for what its members mean.
    """

    def __init__(self, bundle: Bundle, forward: ForwardSession, *, slots: int = 1, capacity: int | None = None) -> None:
        """Take memory for the tokens.

        Args:
            bundle: of task `text-generation`, without a cache.
            forward: its loaded graph.
            slots: rows that are remembered.
            capacity: tokens per row (default and maximum: the bundle's `max_length`).

        Raises:
            UserError: a number is out of range.
        """
        self.backend, self.version, self.device = forward.backend, forward.version, forward.device
        self.choice = forward.choice
        self.vocab_size = bundle.vocab_size
        self.max_slots: int | None = None
        self.max_capacity = forward.max_length
        self._path = bundle.path
        self._forward = forward
        self._allocate(slots, self.max_capacity if capacity is None else capacity)

    def reopen(self, *, slots: int, capacity: int) -> Self:
        """The same loaded graph with tokens of its own."""
        other = copy.copy(self)
        other._allocate(slots, capacity)
        return other

    def step(self, tokens: Ints, lengths: Ints, past_lengths: Ints, slots: Ints | None = None, keep: int = 1) -> Floats:
        """Append tokens and return logits, float32 [batch, keep, vocab]; see `Session.step`."""
        limits = Limits(self.slots, self.capacity, self.vocab_size, self.max_capacity)
        step = limits.checked(tokens, lengths, past_lengths, slots, keep)
        for row, slot in enumerate(step.slots):
            past, new = step.past[row], step.lengths[row]
            self._tokens[slot, past : past + new] = step.tokens[row, :new]
        totals = step.past + step.lengths
        mask = (np.arange(totals.max()) < totals[:, None]).astype(np.int64)
        rows = self._tokens[step.slots, : mask.shape[1]] * mask
        logits = self._forward.run(rows, mask, keep=keep)[LOGITS]
        # The graph goes back beyond this step's tokens where it has fewer than `keep`; a step repeats its first.
        kept = step.wanted() - step.lengths[:, None] + keep
        return np.take_along_axis(logits, kept[:, :, None], 1)

    def copy_prefix(self, source: int, target: int, length: int) -> int:
        """Copy the first tokens of a row; see `Session.copy_prefix`."""
        self._tokens[target, :length] = self._tokens[source, :length]
        return length

    def exchange(self, one: int, other: int, length: int) -> bool:
        """Let two rows have each other's first tokens; see `Session.exchange`."""
        self._tokens[[one, other], :length] = self._tokens[[other, one], :length]
        return True

    def _allocate(self, slots: int, capacity: int) -> None:
        check_allocation(slots, capacity, self.max_capacity, self._path)
        self.slots, self.capacity = slots, capacity
        self._tokens = np.zeros((slots, capacity), np.int64)
