"""What a session binds to ONNX Runtime for some rows of its cache: made once, its content replaced step by step."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.contract import LOGITS, LOGITS_TO_KEEP, past_names, present_names
from runtime.kv_cache import KVCache
from runtime.ort_model import OrtModel, import_onnxruntime

if TYPE_CHECKING:
    from onnxruntime import IOBinding, OrtValue, RunOptions

Array = NDArray[Any]
GRAPH_ID = "gpu_graph_id"  # a run's option: which captured graph it is; 0 is ONNX Runtime's own
NO_CAPTURE = -1
_ON_HOST = (LOGITS_TO_KEEP,)  # what the CUDA provider reads on the host: shapes come of it


class Bound(Protocol):
    """The binding of some rows."""

    def run(self, feeds: Mapping[str, Array], logits: Array, *, declared: bool) -> None:
        """Run a step of these rows.

        Args:
            feeds: the inputs but for the cache, contiguous.
            logits: [batch, keep, vocab] in the graph's dtype; gets the step's.
            declared: whether the graph's declared shape of logits is that shape, so that a buffer may be given.
        """
        ...


class HostBound:
    """On the CPU: inputs are read from arrays that steps write into, logits written where the caller wants them."""

    def __init__(self, loaded: OrtModel, cache: KVCache, first_slot: int, batch: int) -> None:
        """Bind `batch` rows of the cache from `first_slot` on."""
        self._loaded = loaded
        self._binding = _binding(loaded, cache, first_slot, batch, "cpu")
        self.inputs: dict[str, Array] = {}

    def run(self, feeds: Mapping[str, Array], logits: Array, *, declared: bool) -> None:
        """See `Bound.run`."""
        for name, array in feeds.items():
            self._feed(name, array)
        binding = self._binding
        if declared:
            binding.bind_output(LOGITS, "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data)
        else:
            binding.bind_output(LOGITS, "cpu")
        with self._loaded.running("a step"):
            self._loaded.model.run_with_iobinding(binding)
        if not declared:
            logits[...] = binding.get_outputs()[0].numpy()

    def _feed(self, name: str, array: Array) -> None:
        """Give an input its content: in place where the last step's had the same shape."""
        held = self.inputs.get(name)
        if held is not None and held.shape == array.shape:
            held[...] = array
            return
        own = self.inputs[name] = array.copy()  # the next step writes into it, and this one may be the caller's
        self._binding.bind_input(name, "cpu", 0, own.dtype.type, own.shape, own.ctypes.data)


class DeviceBound:
    """On a GPU: inputs and logits lie there, allocated when a shape is first seen, and are updated in place.

    With a graph's id, whose shapes never change, ONNX Runtime runs the first step a few times over and captures it (a
    step writes the same keys and values each time), and from then on launches the capture, which knows the addresses of
    that first time only.
    """

    def __init__(self, loaded: OrtModel, cache: KVCache, first_slot: int, batch: int, graph: int | None = None) -> None:
        """Bind `batch` rows of the cache from `first_slot` on.

        Args:
            loaded: the graph, on `cuda`.
            cache: there too.
            first_slot: of the rows.
            batch: rows.
            graph: an id that no other binding has; None: steps are not captured.
        """
        self._loaded, self._graph = loaded, graph
        self._binding = _binding(loaded, cache, first_slot, batch, "cuda")
        self._inputs: dict[str, _Held] = {}
        self._logits: _Held | None = None
        self._options = _run_options(NO_CAPTURE if graph is None else graph) if loaded.captures else None
        self._captured = False

    def run(self, feeds: Mapping[str, Array], logits: Array, *, declared: bool) -> None:
        """See `Bound.run`.

        Raises:
            UserError: no memory, or the step cannot be captured.
            CheckFailed: the graph does not run.
        """
        for name, array in feeds.items():
            self._feed(name, array)
        if declared:
            self._bind_logits(logits)
        else:
            self._logits = None
            self._binding.bind_output(LOGITS, "cpu")
        first = self._graph is not None and not self._captured
        with self._loaded.capturing() if first else self._loaded.running("a step"):
            self._loaded.model.run_with_iobinding(self._binding, self._options)
        if first:
            self._captured = True
            release = self._loaded.model.release_captured_graph
            weakref.finalize(self, release, self._graph).atexit = False
        result = self._binding.get_outputs()[0] if self._logits is None else self._logits.value
        logits[...] = result.numpy()

    def _feed(self, name: str, array: Array) -> None:
        """Give an input its content: in place where the last step's was of the same form."""
        held = self._inputs.get(name)
        if held is not None and held.fits(array):
            held.value.update_inplace(array)
            return
        assert not self._captured, f"{name} would leave the address that its captured graph reads"
        device = "cpu" if name in _ON_HOST else "cuda"
        value = import_onnxruntime().OrtValue.ortvalue_from_numpy(array, device, 0)
        self._inputs[name] = _Held(array.shape, array.dtype, value)
        self._binding.bind_ortvalue_input(name, value)

    def _bind_logits(self, logits: Array) -> None:
        if self._logits is not None and self._logits.fits(logits):
            return
        assert not self._captured, "logits would leave the address that their captured graph writes"
        make = import_onnxruntime().OrtValue.ortvalue_from_shape_and_type
        value = make(logits.shape, logits.dtype.type, "cuda", 0)
        self._logits = _Held(logits.shape, logits.dtype, value)
        self._binding.bind_ortvalue_output(LOGITS, value)


@dataclass(frozen=True)
class _Held:
    """An OrtValue and its form, which `update_inplace` does not compare: of another dtype it reads past the array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    value: OrtValue

    def fits(self, array: Array) -> bool:
        """Whether it may take the array's content."""
        return self.shape == array.shape and self.dtype == array.dtype


def _binding(loaded: OrtModel, cache: KVCache, first_slot: int, batch: int, device: str) -> IOBinding:
    """Past and present of the rows are the same memory."""
    binding = loaded.model.io_binding()
    binding.bind_output(LOGITS, "cpu")  # the first of the outputs
    shape = (batch, *cache.shape[1:])
    for layer in range(cache.layers):
        names = zip(past_names(layer), present_names(layer), cache.addresses(layer, first_slot), strict=True)
        for past, present, address in names:
            place = (device, 0, cache.dtype.type, shape, address)
            binding.bind_input(past, *place)
            binding.bind_output(present, *place)
    return binding


def _run_options(graph: int) -> RunOptions:
    options = import_onnxruntime().RunOptions()
    options.add_run_config_entry(GRAPH_ID, str(graph))
    return options
