"""A deserialised engine: its profiles, its buffers, and the execution contexts that run it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.contract import INPUT_IDS, LOGITS, LOGITS_INDICES, WRITE_INDICES, past_names, present_names
from runtime.cuda import Cuda, Memory, Pinned
from runtime.engines import Chosen, deserialise
from runtime.errors import CheckFailed, UserError
from runtime.session import Floats, Ints
from runtime.tensorrt_api import Messages, logger

FED = (INPUT_IDS, WRITE_INDICES, LOGITS_INDICES)
ALIGNMENT = 256  # bytes, of every address that TensorRT is given


@dataclass(frozen=True)
class Profile:
    """The shapes of one optimization profile: least and most of batch, sequence and kept logits."""

    index: int
    batch: range
    width: range
    kept: range

    @classmethod
    def read(cls, engine: Any, index: int) -> Profile:
        """From the engine."""
        least, _, most = engine.get_tensor_profile_shape(INPUT_IDS, index)
        fewest, _, kept = engine.get_tensor_profile_shape(LOGITS_INDICES, index)
        return cls(
            index, *(range(a, b + 1) for a, b in ((least[0], most[0]), (least[1], most[1]), (fewest[1], kept[1])))
        )

    def takes(self, batch: int, width: int, kept: int) -> bool:
        """Whether a step of these dimensions is within it."""
        return batch in self.batch and width in self.width and kept in self.kept


class LoadedEngine:
    """The weights on the GPU, one stream, staging buffers made once, and caches that sessions take and give back.

    Steps of its sessions run one after another: it is not for several threads at once.
    """

    def __init__(self, bundle: Bundle, chosen: Chosen) -> None:
        """Deserialise and check the engine.

        Raises:
            UserError: TensorRT refuses the plan, or the plan is not what the manifest says.
        """
        self.record, self.cuda = chosen.engine, chosen.cuda
        self._trt, self._path = chosen.trt, bundle.path
        self._rebuild = f"run {self.record.rebuild(bundle.path)}"
        self._messages = Messages()
        self._runtime = chosen.trt.Runtime(logger(chosen.trt, self._messages))
        self.engine = deserialise(bundle, chosen, self._runtime, self._messages, self._rebuild)
        self.profiles = sorted(
            (Profile.read(self.engine, index) for index in range(self.engine.num_optimization_profiles)),
            key=lambda profile: (len(profile.width), len(profile.kept)),
        )
        self.max_batch = max(profile.batch[-1] for profile in self.profiles)
        self.max_width = max(profile.width[-1] for profile in self.profiles)
        self.max_kept = max(profile.kept[-1] for profile in self.profiles)
        geometry = bundle.cache_geometry
        self._check(geometry.layers)
        past = past_names(0)[0]
        self.capacity = int(self.engine.get_tensor_shape(past)[2])
        self.slot_bytes = geometry.kv_heads * self.capacity * geometry.head_dim * int(self._item_bytes(past))
        self.cache_shape = (geometry.kv_heads, self.capacity, geometry.head_dim)
        self.layers, self.vocab_size = geometry.layers, bundle.vocab_size
        if self.max_batch > 1 and self.slot_bytes % ALIGNMENT:
            raise UserError(
                f"{self.record.path}: a row's cache of {self.slot_bytes} bytes is no multiple of {ALIGNMENT}; "
                f"{self._rebuild} and a --max-seq-len that is a multiple of 64"
            )
        self.stream = self.cuda.stream()
        self._config: Any = None
        self._caches: list[Cache] = []
        self._runners: dict[tuple[int, int], Runner] = {}
        self.fed = {name: Staged(self.cuda, self._largest(name), self._dtype(name)) for name in FED}
        self.logits = Staged(self.cuda, (self.max_batch * self.max_kept, self.vocab_size), self._dtype(LOGITS))

    def run(self, feeds: Mapping[str, Ints], cache: Cache, first_slot: int) -> Floats:
        """Run rows of consecutive slots: float32 [batch, kept, vocab], the caller's own."""
        (batch, width), kept = feeds[INPUT_IDS].shape, feeds[LOGITS_INDICES].shape[1]
        fitting = (profile for profile in self.profiles if profile.takes(batch, width, kept))
        profile = next(fitting, None)
        if profile is None:
            raise UserError(
                f"a step of {batch} rows of {width} tokens with {kept} logits each is in no profile of "
                f"{self.record.path}; {self._rebuild} and larger --max-batch-size or --max-input-len"
            )
        for name, array in feeds.items():
            self.fed[name].fill(array)
        self._runner(profile, batch, width).run(feeds, cache, first_slot)
        self.stream.wait()
        return np.array(self.logits.view((batch, kept, self.vocab_size)), np.float32)

    def take_cache(self) -> Cache:
        """A cache of zeros, an earlier one where it has been given back: then captured graphs stay valid."""
        cache = self._caches.pop() if self._caches else Cache(self)
        for memory in cache.buffers:
            self.stream.clear(memory)
        return cache

    def give_cache(self, cache: Cache) -> None:
        """Nobody uses it any more."""
        self._caches.append(cache)

    def fail(self, what: str) -> CheckFailed:
        """What to raise where TensorRT says no; with the last thing that it logged."""
        return CheckFailed(f"{self.record.path}: {what} ({self._messages.reason()}); {self._rebuild}")

    def _create_context(self, profile: Profile) -> Any:
        """An execution context for one profile."""
        context = self.engine.create_execution_context(*self._context_options())
        if context is None:
            raise self.fail("TensorRT made no execution context")
        if profile.index != 0 and not context.set_optimization_profile_async(profile.index, self.stream.handle):
            raise self.fail(f"TensorRT refused profile {profile.index}")
        self.stream.wait()
        return context

    def _context_options(self) -> tuple[Any, ...]:
        """TensorRT-RTX compiles kernels when it first sees a shape, once for all contexts, and captures by itself."""
        if self.record.flavor != "tensorrt-rtx":
            return ()
        if self._config is None:
            self._config = self.engine.create_runtime_config()
            self._config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._config.set_runtime_cache(self._config.create_runtime_cache())
        return (self._config,)

    def _runner(self, profile: Profile, batch: int, width: int) -> Runner:
        """Prefill has one context; decoding one for each batch size, whose graph another shape would spoil."""
        decodes = width == 1
        key = (profile.index, batch if decodes else 0)
        if key not in self._runners:
            capture = decodes and self.record.flavor == "tensorrt"
            self._runners[key] = Runner(weakref.proxy(self), self._create_context(profile), capture)
        return self._runners[key]

    def _check(self, layers: int) -> None:
        """The plan is what its record says, and updates its cache in place."""
        record, engine = self.record, self.engine
        found = (self.max_batch, self.max_width, int(engine.get_tensor_shape(past_names(0)[0])[2]))
        declared = (record.max_batch_size, record.max_input_len, record.max_seq_len)
        if found != declared:
            raise UserError(
                f"{record.path} takes batch, input and sequence up to {found}, its record says {declared}; "
                f"{self._rebuild}"
            )
        for layer in range(layers):
            for past, present in zip(past_names(layer), present_names(layer), strict=True):
                if engine.get_aliased_input_tensor(present) != past:
                    raise UserError(f"{record.path} does not update {past} in place; {self._rebuild}")

    def _dtype(self, name: str) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self._trt.nptype(self.engine.get_tensor_dtype(name)))
        return dtype

    def _item_bytes(self, name: str) -> int:
        """Not through numpy, which has no bfloat16."""
        return int(self.engine.get_tensor_dtype(name).itemsize)

    def _largest(self, name: str) -> tuple[int, ...]:
        second = {INPUT_IDS: self.max_width, LOGITS_INDICES: self.max_kept}
        return (self.max_batch, second.get(name, 1))


class Runner:
    """One execution context, bound to the cache rows that it last ran on.

    A decode step is one CUDA graph, copies included: it repeats the same launches at the same addresses, and each
    takes longer to launch than a small model's kernel to run. It is captured the second time that the same rows run:
    the first enqueue after a change of shape or address lets TensorRT settle, which a capture would fail on or record.
    A prefill is not captured: each has its own length, and launches hide behind its work.
    """

    def __init__(self, loaded: LoadedEngine, context: Any, capture: bool) -> None:
        self._loaded, self._context, self._capture = loaded, context, capture
        self._bound: tuple[Any, ...] = ()
        self._graph: Callable[[], None] | None = None

    def run(self, feeds: Mapping[str, Ints], cache: Cache, first_slot: int) -> None:
        """Ask the stream for copies in, the step, and the copy out; what is fed lies in the staging buffers."""
        shapes = {name: array.shape for name, array in feeds.items()}
        bound = (cache, first_slot, *shapes.items())
        if bound != self._bound:
            self._bind(shapes, cache, first_slot)
            self._bound, self._graph = bound, None
            self._enqueue(shapes)
        elif self._graph is not None:
            self._graph()
        elif self._capture:
            self._graph = self._loaded.stream.capture(lambda: self._enqueue(shapes))
            self._graph()
        else:
            self._enqueue(shapes)

    def _bind(self, shapes: Mapping[str, tuple[int, ...]], cache: Cache, first_slot: int) -> None:
        loaded, batch = self._loaded, shapes[INPUT_IDS][0]
        for name, shape in shapes.items():
            self._shape(name, shape)
            self._address(name, loaded.fed[name].device.address)
        self._address(LOGITS, loaded.logits.device.address)
        for layer in range(loaded.layers):
            for part, (past, present) in enumerate(zip(past_names(layer), present_names(layer), strict=True)):
                self._shape(past, (batch, *loaded.cache_shape))
                address = cache.address(layer, part, first_slot)
                self._address(past, address)
                self._address(present, address)

    def _enqueue(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        loaded, stream = self._loaded, self._loaded.stream
        for name, shape in shapes.items():
            stream.to_device(loaded.fed[name].device.address, loaded.fed[name].host, loaded.fed[name].bytes(shape))
        if not self._context.execute_async_v3(stream.handle):
            raise loaded.fail("TensorRT could not run a step")
        size = loaded.logits.bytes((*shapes[LOGITS_INDICES], loaded.vocab_size))
        stream.to_host(loaded.logits.host, loaded.logits.device.address, size)

    def _shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise self._loaded.fail(f"TensorRT refused {name} of shape {shape}")

    def _address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self._loaded.fail(f"TensorRT refused the address of {name}")


class Cache:
    """Keys and values of the engine's largest batch; slot s is contiguous and starts at `address(layer, part, s)`."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self._slot_bytes = loaded.slot_bytes
        size = loaded.max_batch * loaded.slot_bytes
        self.buffers: list[Memory] = [loaded.cuda.allocate(size) for _ in range(2 * loaded.layers)]

    def address(self, layer: int, part: int, slot: int) -> int:
        """Of a layer's keys (part 0) or values (part 1) from a slot on."""
        return self.buffers[2 * layer + part].address + slot * self._slot_bytes


class Staged:
    """A tensor on the GPU and its pinned twin on the host, of the largest shape that steps have."""

    def __init__(self, cuda: Cuda, largest: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.host: Pinned = cuda.pinned((int(np.prod(largest)),), dtype)
        self.device: Memory = cuda.allocate(self.host.array.nbytes)

    def fill(self, array: NDArray[Any]) -> None:
        """Write into the host's twin."""
        self.view(array.shape)[...] = array

    def view(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """The host's twin in the shape of a step."""
        return self.host.array[: int(np.prod(shape))].reshape(shape)

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Of a tensor of this shape."""
        return int(np.prod(shape)) * self.host.array.itemsize
