"""A bundle's graph on ONNX Runtime, through IOBinding: past and present are one buffer, nothing is copied.

Both targets' graphs run here; that of target `tensorrt` as the fallback where there is no engine.
"""

from __future__ import annotations

import copy
import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.contract import LOGITS, past_names, present_names
from runtime.errors import CheckFailed, UserError
from runtime.hardware import cpu_name, cuda_name
from runtime.kv_cache import KVCache, numpy_dtype
from runtime.manifest import MODEL
from runtime.session import Floats, Ints
from runtime.steps import CONTRACTS, Limits, Step, check_allocation

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

_LOAD_ERRORS = (
    *("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented"),
    "RuntimeException",  # no memory, for one
)
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


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
            bundle: an opened bundle of task `text-generation`.
            device: `cpu` or `cuda`.
            slots: rows of the cache.
            capacity: tokens per row (default and maximum: the bundle's `max_length`).
            threads: threads within an operator (default: one per core).

        Raises:
            UserError: onnxruntime or its CUDA provider is missing, the graph cannot be loaded, the bundle
                is of an unknown target, another task or bf16, or a number is out of range.
        """
        ort = import_onnxruntime()
        self.backend, self.version = f"onnxruntime-{device}", str(ort.__version__)
        self.choice = ""
        self.max_slots: int | None = None
        self.device = cpu_name() if device == "cpu" else cuda_name()
        self.vocab_size = bundle.vocab_size
        self._placement = device
        self._bundle = bundle
        self.max_capacity = bundle.manifest.max_length
        self._model = _load_model(ort, bundle, device, threads)
        logits = next(spec for spec in bundle.manifest.graph.outputs if spec.name == LOGITS)
        self._logits_dtype, self._kept = numpy_dtype(logits.dtype), logits.shape[1]
        self._contract = CONTRACTS[bundle.manifest.target]
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
        logits = np.empty((len(step.tokens), keep, self.vocab_size), self._logits_dtype)
        for rows in self._contract.split(step, self.capacity):
            self._run(step.rows(rows), logits[rows])
        return logits.astype(np.float32, copy=False)

    def _run(self, step: Step, logits: NDArray[Any]) -> None:
        """Run rows of consecutive slots."""
        feeds = self._contract.feeds(step)
        binding = self._binding(int(step.slots[0]), len(step.tokens))
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        if isinstance(self._kept, str) or self._kept == step.keep:
            binding.bind_output(LOGITS, "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data)
            self._execute(binding)
            return
        # A graph that declares one row of logits refuses a larger buffer: let ONNX Runtime make its own.
        binding.bind_output(LOGITS, "cpu")
        self._execute(binding)
        logits[...] = binding.get_outputs()[0].numpy()

    def _execute(self, binding: IOBinding) -> None:
        try:
            self._model.run_with_iobinding(binding)
        except RuntimeError as error:  # what onnxruntime raises when an operator refuses its inputs
            reason = " ".join(str(error).split())[:300]
            if "allocate memory" in reason or "bad_alloc" in reason:
                raise UserError(
                    f"{self.backend} has no memory for a step: {reason}; take fewer or shorter prompts at once"
                ) from error
            raise CheckFailed(
                f"{self.backend} cannot run a step of {self._bundle.path}: {reason}; "
                "run nemotron-export selftest, then copy or export the bundle again"
            ) from error

    def _binding(self, first_slot: int, batch: int) -> IOBinding:
        """The binding of past and present to `batch` cache rows from `first_slot` on; made once."""
        if (first_slot, batch) not in self._bindings:
            binding = self._model.io_binding()
            binding.bind_output(LOGITS, "cpu")  # the first of the outputs
            shape = (batch, *self.cache.shape[1:])
            for layer in range(self.cache.layers):
                addresses = self.cache.addresses(layer, first_slot)
                names = zip(past_names(layer), present_names(layer), addresses, strict=True)
                for past, present, address in names:
                    place = (self._placement, 0, self.cache.dtype.type, shape, address)
                    binding.bind_input(past, *place)
                    binding.bind_output(present, *place)
            self._bindings[first_slot, batch] = binding
        return self._bindings[first_slot, batch]

    def _allocate(self, slots: int, capacity: int) -> None:
        check_allocation(slots, capacity, self.max_capacity, self._bundle.path)
        self.slots, self.capacity = slots, capacity
        self.cache = KVCache(self._bundle.cache_geometry, slots, capacity, self._placement)
        self._bindings: dict[tuple[int, int], IOBinding] = {}


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module, imported without its telemetry unless the user has said otherwise.

    Raises:
        UserError: it is not installed; names both extras.
    """
    # Else its import writes a device id and an event database into the user's cache directory, to be sent home.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UserError(
            "onnxruntime is not installed; pip install 'nemotron-export[cpu]' or, with an NVIDIA GPU, "
            "'nemotron-export[gpu]' (one of them, never both)"
        ) from error


def _load_model(ort: ModuleType, bundle: Bundle, device: str, threads: int | None) -> InferenceSession:
    manifest = bundle.manifest
    if manifest.task != "text-generation":
        raise UserError(f"{bundle.path} is for {manifest.task}; export it with --task text-generation")
    if manifest.target not in CONTRACTS:
        known = " or ".join(CONTRACTS)
        raise UserError(f"{bundle.path} is for {manifest.target}; export it with --target {known}")
    numpy_dtype(bundle.cache_geometry.dtype)  # refused here, where the user reads why, not by a missing kernel
    if threads is not None and threads < 1:
        raise UserError(f"threads should be at least 1, not {threads}")
    provider = _PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise UserError(
            f"this onnxruntime {ort.__version__} has no {provider}; "
            "pip uninstall onnxruntime, then pip install 'nemotron-export[gpu]', or use --device cpu"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # errors come as exceptions, and are told once
    errors = ort.capi.onnxruntime_pybind11_state
    try:
        model: InferenceSession = ort.InferenceSession(
            bundle.file(MODEL), options, providers=[provider, *({_PROVIDERS["cpu"]} - {provider})]
        )
    except tuple(getattr(errors, name) for name in _LOAD_ERRORS) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"onnxruntime {ort.__version__} cannot load {bundle.file(MODEL)}: {reason}; "
            "check the bundle (nemotron-export selftest), or export it again"
        ) from error
    if provider not in model.get_providers():
        raise UserError(
            f"{provider} did not start (its CUDA libraries are missing or too old); "
            "pip install 'nemotron-export[gpu]' in an environment of its own, or use --device cpu"
        )
    return model
