"""A bundle's graph on ONNX Runtime, through IOBinding: past and present are one buffer, nothing is copied.

Both targets' graphs run here; that of target `tensorrt` as the fallback where there is no engine.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.contract import LOGITS
from runtime.errors import UserError
from runtime.kv_cache import KVCache, numpy_dtype
from runtime.ort_binding import Bound, DeviceBound, HostBound
from runtime.ort_model import check_model, import_onnxruntime, load_model
from runtime.session import Floats, Ints
from runtime.steps import GraphContract, Limits, Step, check_allocation, contract_of

__all__ = ["OrtSession", "import_onnxruntime"]

# Columns that run at once on a CPU: 64 to 2048 take the same time a token, and what operators hold grows with them.
PREFILL_WIDTH = 256


def check_cached(bundle: Bundle, device: str) -> GraphContract:
    """Refuse a bundle that no `OrtSession` runs, before anything is loaded; how its graph is driven.

    Args:
        bundle: an opened one.
        device: `cpu` or `cuda`.

    Raises:
        UserError: as `runtime.ort_model.check_model`, or the bundle is of an unknown target, another task or bf16.
    """
    import_onnxruntime()  # the first thing to know
    if bundle.manifest.task != "text-generation":
        raise UserError(f"{bundle.path} is for {bundle.manifest.task}; export it with --task text-generation")
    contract = contract_of(bundle)
    numpy_dtype(bundle.cache_geometry.dtype)  # refused here, where the user reads why, not by a missing kernel
    check_model(bundle, device)
    return contract


class OrtSession:
    """The Session over the ONNX graph itself. See `runtime.session.Session` for what its members mean."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str = "cpu",
        slots: int = 1,
        capacity: int | None = None,
        threads: int | None = None,
        capture: bool = False,
    ) -> None:
        """Load the graph and allocate the cache.

        Args:
            bundle: an opened bundle of task `text-generation` whose graph has a cache.
            device: `cpu` or `cuda`.
            slots: rows of the cache.
            capacity: tokens per row (default and maximum: the bundle's `max_length`).
            threads: threads within an operator (default: one per core).
            capture: whether decode steps become CUDA graphs: of target `onnxruntime`, on `cuda`. It has not run on
                hardware yet. One thread may use such a session: ONNX Runtime captures for each thread anew.

        Raises:
            UserError: onnxruntime or its CUDA provider is missing, the graph cannot be loaded or captured, the bundle
                is of an unknown target, another task or bf16, or a number is out of range.
        """
        self._contract = check_cached(bundle, device)
        if capture and (device != "cuda" or bundle.manifest.target != "onnxruntime"):
            raise UserError(
                f"CUDA graphs are captured of bundles of target onnxruntime on --device cuda, not of {bundle.path}, "
                f"of target {bundle.manifest.target}, on {device}; open it without capture"
            )
        self._loaded = load_model(bundle, device, threads, capture=capture)
        self._graphs = itertools.count(1)  # ids, of all sessions on this model
        self.backend, self.version, self.device = self._loaded.backend, self._loaded.version, self._loaded.device
        self.choice = ""
        self.max_slots: int | None = None
        self.vocab_size = bundle.vocab_size
        self._placement = device
        self._bundle = bundle
        self.max_capacity = bundle.manifest.max_length
        logits = next(spec for spec in bundle.manifest.graph.outputs if spec.name == LOGITS)
        self._logits_dtype, self._kept = numpy_dtype(logits.dtype), logits.shape[1]
        self._allocate(slots, self.max_capacity if capacity is None else capacity)

    def reopen(self, *, slots: int, capacity: int) -> Self:
        """The same loaded weights with a cache of their own."""
        other = copy.copy(self)
        other._allocate(slots, capacity)
        return other

    def step(self, tokens: Ints, lengths: Ints, past_lengths: Ints, slots: Ints | None = None, keep: int = 1) -> Floats:
        """Append tokens and return logits, float32 [batch, keep, vocab]; see `Session.step`."""
        limits = Limits(self.slots, self.capacity, self.vocab_size, self.max_capacity)
        step = limits.checked(tokens, lengths, past_lengths, slots, keep)
        logits = self._empty_logits(step)
        if self._placement == "cpu" and step.tokens.shape[1] > PREFILL_WIDTH:
            for piece in step.pieces(PREFILL_WIDTH, PREFILL_WIDTH):
                part = self._empty_logits(piece.step)
                self._run(piece.step, part)
                piece.place(part, logits)
        else:
            self._run(step, logits)
        return logits.astype(np.float32, copy=False)

    def copy_prefix(self, source: int, target: int, length: int) -> int:
        """Copy the first tokens of a slot; see `Session.copy_prefix`."""
        return self.cache.copy_prefix(source, target, length)

    def exchange(self, one: int, other: int, length: int) -> bool:
        """Let two slots have each other's first tokens; see `Session.exchange`."""
        return self.cache.exchange(one, other, length)

    def _empty_logits(self, step: Step) -> NDArray[Any]:
        return np.empty((len(step.tokens), step.keep, self.vocab_size), self._logits_dtype)

    def _run(self, step: Step, logits: NDArray[Any]) -> None:
        """Run rows of any slots, as many at once as the graph takes."""
        for rows in self._contract.split(step, self.capacity):
            self._run_neighbours(step.rows(rows), logits[rows])

    def _run_neighbours(self, step: Step, logits: NDArray[Any]) -> None:
        """Run rows of consecutive slots."""
        decodes = self._placement == "cuda" and step.tokens.shape[1] == 1 and step.keep == 1
        bound = self._bound(int(step.slots[0]), len(step.tokens), decodes)
        feeds = self._contract.feeds(step, self.capacity if decodes else None)
        # A graph that declares one row of logits refuses a larger buffer: then ONNX Runtime makes its own.
        bound.run(feeds, logits, declared=isinstance(self._kept, str) or self._kept == step.keep)

    def _bound(self, first_slot: int, batch: int, decodes: bool) -> Bound:
        """The binding of `batch` cache rows from `first_slot` on; made once. Decode steps of a GPU have their own."""
        key = (first_slot, batch, decodes)
        if key not in self._bindings:
            rows = (self._loaded, self.cache, first_slot, batch)
            if self._placement == "cpu":
                self._bindings[key] = HostBound(*rows)
            else:
                graph = next(self._graphs) if decodes and self._loaded.captures else None
                self._bindings[key] = DeviceBound(*rows, graph)
        return self._bindings[key]

    def _allocate(self, slots: int, capacity: int) -> None:
        check_allocation(slots, capacity, self.max_capacity, self._bundle.path)
        self.slots, self.capacity = slots, capacity
        self.cache = KVCache(self._bundle.cache_geometry, slots, capacity, self._placement)
        self._bindings: dict[tuple[int, int, bool], Bound] = {}
