"""A bundle's graph on ONNX Runtime, through IOBinding: past and present are one buffer, nothing is copied."""

from __future__ import annotations

import copy
import importlib
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, past_names, present_names
from runtime.errors import CheckFailed, UserError
from runtime.hardware import cpu_name, cuda_name
from runtime.kv_cache import KVCache, numpy_dtype
from runtime.manifest import MODEL
from runtime.session import Floats, Ints

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding

_LOAD_ERRORS = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OrtSession:
    """The Session of target `onnxruntime`. See `runtime.session.Session` for what its members mean."""

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
            bundle: an opened bundle of target `onnxruntime` and task `text-generation`.
            device: `cpu` or `cuda`.
            slots: rows of the cache.
            capacity: tokens per row (default and maximum: the bundle's `max_length`).
            threads: threads within an operator (default: one per core).

        Raises:
            UserError: onnxruntime or its CUDA provider is missing, the graph cannot be loaded, the bundle
                is of another target or task, or a number is out of range.
        """
        ort = import_onnxruntime()
        self.backend, self.version = f"onnxruntime-{device}", str(ort.__version__)
        self.device = cpu_name() if device == "cpu" else cuda_name()
        self.vocab_size = bundle.vocab_size
        self._placement = device
        self._bundle = bundle
        self._limit = bundle.manifest.max_length
        self._model = _load_model(ort, bundle, device, threads)
        outputs = {spec.name: spec.dtype for spec in bundle.manifest.graph.outputs}
        self._logits_dtype = numpy_dtype(outputs[LOGITS])
        self._allocate(slots, self._limit if capacity is None else capacity)

    def reopen(self, *, slots: int, capacity: int) -> Self:
        """The same loaded weights with a cache of their own."""
        other = copy.copy(self)
        other._allocate(slots, capacity)
        return other

    def step(self, tokens: Ints, lengths: Ints, past_lengths: Ints, slots: Ints | None = None, keep: int = 1) -> Floats:
        """Append tokens and return logits, float32 [batch, keep, vocab]; see `Session.step`."""
        tokens, lengths, past = (np.asarray(a, np.int64) for a in (tokens, lengths, past_lengths))
        slots = np.arange(len(tokens)) if slots is None else np.asarray(slots, np.int64)
        tokens = self._checked(tokens, lengths, past, slots, keep)
        logits = np.empty((len(tokens), keep, self.vocab_size), self._logits_dtype)
        for rows in split_step(lengths, past, slots):
            width = int(lengths[rows].max())
            self._run(tokens[rows, :width], past[rows] + lengths[rows], int(slots[rows][0]), logits[rows])
        return logits.astype(np.float32, copy=False)

    def _run(self, tokens: Ints, valid: Ints, first_slot: int, logits: NDArray[Any]) -> None:
        """Run rows of consecutive slots, which hold `valid` tokens each when it is done."""
        mask = (np.arange(valid.max()) < valid[:, None]).astype(np.int64)
        feeds = {
            INPUT_IDS: np.ascontiguousarray(tokens),
            ATTENTION_MASK: mask,
            LOGITS_TO_KEEP: np.array([logits.shape[1]], np.int64),
        }
        binding = self._binding(first_slot, len(tokens))
        for name, array in feeds.items():
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        if logits.shape[1] == 1:
            binding.bind_output(LOGITS, "cpu", 0, logits.dtype.type, logits.shape, logits.ctypes.data)
            self._execute(binding)
            return
        # The graph declares one row of logits and ONNX Runtime refuses a larger buffer: let it make its own.
        binding.bind_output(LOGITS, "cpu")
        self._execute(binding)
        logits[...] = binding.get_outputs()[0].numpy()

    def _execute(self, binding: IOBinding) -> None:
        try:
            self._model.run_with_iobinding(binding)
        except RuntimeError as error:  # what onnxruntime raises when an operator refuses its inputs
            reason = " ".join(str(error).split())[:300]
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
        if capacity < 1 or slots < 1:
            raise UserError(f"a cache of {slots} slots of {capacity} tokens is none; ask for at least one of each")
        if capacity > self._limit:
            raise UserError(
                f"a capacity of {capacity} tokens passes the {self._limit} of {self._bundle.path}; "
                "ask for less, or export with a larger --max-length"
            )
        self.slots, self.capacity = slots, capacity
        self.cache = KVCache(self._bundle.cache_geometry, slots, capacity, self._placement)
        self._bindings: dict[tuple[int, int], IOBinding] = {}

    def _checked(self, tokens: Ints, lengths: Ints, past: Ints, slots: Ints, keep: int) -> Ints:
        """Refuse a step that the graph would get wrong; return its tokens with the padding made harmless."""
        shapes = [a.shape for a in (tokens, lengths, past, slots)]
        if tokens.ndim != 2 or tokens.size == 0 or any(shape != tokens.shape[:1] for shape in shapes[1:]):
            raise UserError(f"a step takes tokens [batch, sequence] and three arrays [batch], not {shapes}")
        if keep < 1:
            raise UserError(f"keep should be at least 1, not {keep}")
        if (lengths < 1).any() or (lengths > tokens.shape[1]).any():
            raise UserError(f"lengths {lengths.tolist()} should be within 1..{tokens.shape[1]}")
        if (slots < 0).any() or (slots >= self.slots).any() or len(np.unique(slots)) != len(slots):
            raise UserError(f"slots {slots.tolist()} should be distinct and within 0..{self.slots - 1}")
        if (past < 0).any():
            raise UserError(f"past lengths {past.tolist()} should not be negative")
        for row in np.flatnonzero(past + lengths > self.capacity):
            raise UserError(
                f"row {row}: {past[row]} cached and {lengths[row]} new tokens pass the capacity of "
                f"{self.capacity}; send fewer, or open the session with up to {self._limit}"
            )
        real = np.arange(tokens.shape[1]) < lengths[:, None]
        outside = real & ((tokens < 0) | (tokens >= self.vocab_size))
        for row, column in np.argwhere(outside):
            raise UserError(
                f"row {row}: token id {tokens[row, column]} is outside the vocabulary of {self.vocab_size}; "
                "use ids of this bundle's tokenizer"
            )
        return np.where(real, tokens, 0)


def split_step(lengths: Ints, past: Ints, slots: Ints) -> list[slice]:
    """Cut a step into batches GroupQueryAttention can run on its cache as it lies in memory.

    Rows run together while their slots are consecutive, and while several new tokens and a past do not
    meet in one batch: there GroupQueryAttention takes one row at a time.
    """
    cuts = [0]
    for row in range(1, len(slots)):
        together = slice(cuts[-1], row + 1)
        chunked = lengths[together].max() > 1 and past[together].any()
        if slots[row] != slots[row - 1] + 1 or chunked:
            cuts.append(row)
    return [slice(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(slots)], strict=True)]


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
    if manifest.target != "onnxruntime":
        raise UserError(f"{bundle.path} is for {manifest.target}; export it with --target onnxruntime")
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
    options.log_severity_level = 3  # asking for more logits than the declared one draws a warning each step
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
