"""A bundle's graph on ONNX Runtime, through IOBinding: past and present are one buffer, nothing is copied.

Both targets' graphs run here; that of target `tensorrt` as the fallback where there is no engine.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.contract import LOGITS, past_names, present_names
from runtime.errors import UserError
from runtime.kv_cache import KVCache, numpy_dtype
from runtime.ort_model import import_onnxruntime, load_model
from runtime.session import Floats, Ints
from runtime.steps import Limits, Step, check_allocation, contract_of

if TYPE_CHECKING:
    from onnxruntime import IOBinding

__all__ = ["OrtSession", "import_onnxruntime"]

# Columns that run at once on a CPU: 64 to 2048 take the same time a token, and what operators hold grows with them.
PREFILL_WIDTH = 256


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
    ) -> None:
        """Load the graph and allocate the cache.

        Args:
            bundle: an opened bundle of task `text-generation` whose graph has a cache.
            device: `cpu` or `cuda`.
            slots: rows of the cache.
            capacity: tokens per row (default and maximum: the bundle's `max_length`).
            threads: threads within an operator (default: one per core).

        Raises:
            UserError: onnxruntime or its CUDA provider is missing, the graph cannot be loaded, the bundle
                is of an unknown target, another task or bf16, or a number is out of range.
        """
        import_onnxruntime()  # the first thing to know
        if bundle.manifest.task != "text-generation":
            raise UserError(f"{bundle.path} is for {bundle.manifest.task}; export it with --task text-generation")
        self._contract = contract_of(bundle)
        numpy_dtype(bundle.cache_geometry.dtype)  # refused here, where the user reads why, not by a missing kernel
        self._loaded = load_model(bundle, device, threads)
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
        bound = self._bound(int(step.slots[0]), len(step.tokens))
        for name, array in self._contract.feeds(step).items():
            bound.feed(name, array)
        binding = bound.binding
        if isinstance(self._kept, str) or self._kept == step.keep:
            binding.bind_output(LOGITS, "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data)
            self._execute(binding)
            return
        # A graph that declares one row of logits refuses a larger buffer: let ONNX Runtime make its own.
        binding.bind_output(LOGITS, "cpu")
        self._execute(binding)
        logits[...] = binding.get_outputs()[0].numpy()

    def _execute(self, binding: IOBinding) -> None:
        with self._loaded.running("a step"):
            self._loaded.model.run_with_iobinding(binding)

    def _bound(self, first_slot: int, batch: int) -> _Bound:
        """The binding of past and present to `batch` cache rows from `first_slot` on; made once."""
        if (first_slot, batch) not in self._bindings:
            binding = self._loaded.model.io_binding()
            binding.bind_output(LOGITS, "cpu")  # the first of the outputs
            shape = (batch, *self.cache.shape[1:])
            for layer in range(self.cache.layers):
                addresses = self.cache.addresses(layer, first_slot)
                names = zip(past_names(layer), present_names(layer), addresses, strict=True)
                for past, present, address in names:
                    place = (self._placement, 0, self.cache.dtype.type, shape, address)
                    binding.bind_input(past, *place)
                    binding.bind_output(present, *place)
            self._bindings[first_slot, batch] = _Bound(binding, {})
        return self._bindings[first_slot, batch]

    def _allocate(self, slots: int, capacity: int) -> None:
        check_allocation(slots, capacity, self.max_capacity, self._bundle.path)
        self.slots, self.capacity = slots, capacity
        self.cache = KVCache(self._bundle.cache_geometry, slots, capacity, self._placement)
        self._bindings: dict[tuple[int, int], _Bound] = {}


@dataclass(frozen=True)
class _Bound:
    """A binding, and the arrays that its inputs but for the cache are read from, by the inputs' names."""

    binding: IOBinding
    inputs: dict[str, NDArray[Any]]

    def feed(self, name: str, array: NDArray[Any]) -> None:
        """Give an input its content: in place where the last step's had the same shape."""
        held = self.inputs.get(name)
        if held is not None and held.shape == array.shape:
            held[...] = array
            return
        own = self.inputs[name] = array.copy()  # the next step writes into it, and this one may be the caller's
        self.binding.bind_input(name, "cpu", 0, own.dtype.type, own.shape, own.ctypes.data)
