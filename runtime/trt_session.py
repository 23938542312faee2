"""A bundle on a TensorRT engine, of either flavor: steps within the engine's profiles, the cache on the GPU, in place.

Written against the documented API; it has run against a recorded fake of it (`tests/support/fake_tensorrt.py`), on
hardware not yet.
"""

from __future__ import annotations

import copy
import weakref
from typing import Self

import numpy as np

from runtime.bundle import Bundle
from runtime.engines import Chosen, choose_engine
from runtime.errors import UserError
from runtime.session import Floats, Ints
from runtime.steps import CONTRACTS, Limits, check_allocation
from runtime.trt_engine import Cache, LoadedEngine


class TrtSession:
    """The Session over an engine. See `runtime.session.Session` for what its members mean."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        chosen: Chosen | None = None,
        slots: int = 1,
        capacity: int | None = None,
    ) -> None:
        """Load the engine; the cache is taken when the first step needs it.

        Args:
            bundle: an opened bundle of target `tensorrt` and task `text-generation`.
            chosen: its engine (default: the one that fits this GPU).
            slots: rows of the cache, at most the engine's batch.
            capacity: tokens per row that steps may use (default and maximum: the engine's).

        Raises:
            UserError: no engine fits, TensorRT refuses it, or a number is out of range.
        """
        chosen = chosen or choose_engine(bundle)
        record = chosen.engine
        self.backend, self.version, self.device = record.flavor, record.version, chosen.gpu.device
        self.choice = f"{record.flavor} {record.version}: {record.path} is for this GPU, {chosen.gpu.name}"
        self.vocab_size = bundle.vocab_size
        self._bundle = bundle
        self._loaded = LoadedEngine(bundle, chosen)
        self._contract = CONTRACTS[bundle.manifest.target]
        self.max_slots: int | None = self._loaded.max_batch
        self.max_capacity = min(self._loaded.capacity, bundle.manifest.max_length)
        self._allocate(slots, self.max_capacity if capacity is None else capacity)

    def reopen(self, *, slots: int, capacity: int) -> Self:
        """The same loaded engine with a cache of its own."""
        other = copy.copy(self)
        other._allocate(slots, capacity)
        return other

    def step(self, tokens: Ints, lengths: Ints, past_lengths: Ints, slots: Ints | None = None, keep: int = 1) -> Floats:
        """Append tokens and return logits, float32 [batch, keep, vocab]; see `Session.step`.

        Tokens beyond the engine's `max_input_len` run as chunks, one after another.
        """
        limits = Limits(self.slots, self.capacity, self.vocab_size, self.max_capacity)
        step = limits.checked(tokens, lengths, past_lengths, slots, keep)
        loaded, logits = self._loaded, np.empty((len(step.tokens), keep, self.vocab_size), np.float32)
        for piece in step.pieces(loaded.max_width, loaded.max_kept):
            part = np.empty((len(piece.rows), piece.step.keep, self.vocab_size), np.float32)
            # Not the session's own capacity: padding may lie anywhere in the engine's.
            for rows in self._contract.split(piece.step, loaded.capacity):
                run = piece.step.rows(rows)
                part[rows] = loaded.run(self._contract.feeds(run), self._taken(), int(run.slots[0]))
            piece.place(part, logits)
        return logits

    def copy_prefix(self, source: int, target: int, length: int) -> int:  # noqa: ARG002 - see below
        """None: the cache is the engine's memory, in which a slot's tokens lie apart; see `Session.copy_prefix`."""
        return 0

    def exchange(self, one: int, other: int, length: int) -> bool:  # noqa: ARG002 - see below
        """Not: see `copy_prefix`."""
        return False

    def _allocate(self, slots: int, capacity: int) -> None:
        record = self._loaded.record
        where = f"{record.path} (built with --max-seq-len {record.max_seq_len})"
        check_allocation(slots, capacity, self.max_capacity, where, "build with a larger one")
        if slots > self._loaded.max_batch:
            raise UserError(
                f"a batch of {slots} passes the {self._loaded.max_batch} of {record.path}; run "
                f"{record.rebuild(self._bundle.path)} --max-batch-size {slots}"
            )
        self.slots, self.capacity = slots, capacity
        self._cache: Cache | None = None

    def _taken(self) -> Cache:
        """The cache, which goes back to the engine when this session is gone."""
        if self._cache is None:
            self._cache = self._loaded.take_cache()
            weakref.finalize(self, self._loaded.give_cache, self._cache).atexit = False
        return self._cache
