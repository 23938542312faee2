"""What a session needs of CUDA: the GPU, memory, copies, a stream and its capture, through cuda-python, checked."""

from __future__ import annotations

import ctypes
import importlib
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.errors import UserError
from runtime.hardware import driver_version


@dataclass(frozen=True)
class Gpu:
    """The first visible GPU: its name, and its compute capability as "8.9"."""

    name: str
    capability: str

    @property
    def device(self) -> str:
        """In words that change when the GPU or its driver does."""
        return f"{self.name} (compute capability {self.capability}), driver {driver_version() or 'unknown'}"


class Cuda:
    """The CUDA runtime of the first visible GPU. Every call is checked; what fails is a UserError that names it."""

    def __init__(self) -> None:
        """Take hold of the library.

        Raises:
            UserError: cuda-python is missing.
        """
        try:
            self.api: Any = importlib.import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise UserError(
                "cuda-python is not installed; pip install 'nemotron-export[tensorrt]' or 'nemotron-export[rtx]'"
            ) from error

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime: its one result, or None."""
        error, *results = getattr(self.api, name)(*arguments)
        if int(error):
            code, text = self.api.cudaGetErrorString(error)
            reason = text.decode() if isinstance(text, bytes) and not int(code) else str(error)
            remedy = _NO_MEMORY if int(error) == int(self.api.cudaError_t.cudaErrorMemoryAllocation) else _ELSE
            raise UserError(f"{name} failed: {reason}; {remedy}")
        return results[0] if results else None

    def gpu(self) -> Gpu | None:
        """The first visible GPU; None where there is no GPU or no driver that runs it."""
        error, count = self.api.cudaGetDeviceCount()
        if int(error) or not count:
            return None
        attributes = self.api.cudaDeviceAttr
        major, minor = (
            self("cudaDeviceGetAttribute", getattr(attributes, f"cudaDevAttrComputeCapability{part}"), 0)
            for part in ("Major", "Minor")
        )
        name = self("cudaGetDeviceProperties", 0).name
        return Gpu(name.decode() if isinstance(name, bytes) else str(name), f"{major}.{minor}")

    def allocate(self, size: int) -> Memory:
        """Device memory of at least one byte, aligned to 256 bytes; freed when nothing refers to it."""
        return Memory(self, "cudaMalloc", "cudaFree", max(size, 1))

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> Pinned:
        """Host memory that copies need not stage."""
        return Pinned(self, shape, np.dtype(dtype))

    def stream(self) -> Stream:
        """A stream of its own: the default one can neither be captured nor run beside others."""
        return Stream(self)


_NO_MEMORY = "free the GPU's memory, or build the engine with a smaller --max-batch-size or --max-seq-len"
_ELSE = "check the driver with nvidia-smi, and start again"


class Memory:
    """An allocation; `address` is a number, as TensorRT takes it."""

    def __init__(self, cuda: Cuda, allocate: str, free: str, size: int) -> None:
        self.size = size
        self.address = int(cuda(allocate, size))
        # At the interpreter's end the driver frees everything, and may be gone already.
        weakref.finalize(self, getattr(cuda.api, free), self.address).atexit = False


class Pinned:
    """Page-locked host memory with a numpy array over it."""

    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        size = math.prod(shape) * dtype.itemsize
        self._memory = Memory(cuda, "cudaMallocHost", "cudaFreeHost", size)
        self.address = self._memory.address
        raw = (ctypes.c_ubyte * size).from_address(self.address)
        self.array: NDArray[Any] = np.frombuffer(memoryview(raw), dtype).reshape(shape)


class Stream:
    """Work in order: copies, kernels, and graphs of them."""

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._stream = cuda("cudaStreamCreateWithFlags", cuda.api.cudaStreamNonBlocking)
        self.handle = int(self._stream)
        weakref.finalize(self, cuda.api.cudaStreamDestroy, self._stream).atexit = False

    def to_device(self, target: int, source: Pinned, size: int) -> None:
        """Copy the first `size` bytes of a pinned array, when the work before is done."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._cuda("cudaMemcpyAsync", target, source.address, size, kind, self._stream)

    def to_host(self, target: Pinned, source: int, size: int) -> None:
        """Copy `size` bytes into a pinned array, when the work before is done."""
        kind = self._cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._cuda("cudaMemcpyAsync", target.address, source, size, kind, self._stream)

    def clear(self, memory: Memory) -> None:
        """Fill with zero bytes."""
        self._cuda("cudaMemsetAsync", memory.address, 0, memory.size, self._stream)

    def wait(self) -> None:
        """Until everything asked of this stream is done."""
        self._cuda("cudaStreamSynchronize", self._stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` asks of this stream, without running it; the result launches it as one."""
        api = self._cuda.api
        with self._capturing(api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal) as captured:
            work()
        graph = captured[0]
        try:
            executable = self._cuda("cudaGraphInstantiate", graph, 0)
        finally:
            self._cuda("cudaGraphDestroy", graph)

        def launch() -> None:
            self._cuda("cudaGraphLaunch", executable, self._stream)

        weakref.finalize(launch, api.cudaGraphExecDestroy, executable).atexit = False
        return launch

    @contextmanager
    def _capturing(self, mode: Any) -> Iterator[list[Any]]:
        """A capture that is ended also where the work fails: a stream left capturing refuses everything."""
        captured: list[Any] = []
        self._cuda("cudaStreamBeginCapture", self._stream, mode)
        try:
            yield captured
        except BaseException:
            self._cuda.api.cudaStreamEndCapture(self._stream)
            raise
        captured.append(self._cuda("cudaStreamEndCapture", self._stream))
