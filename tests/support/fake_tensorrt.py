"""TensorRT and CUDA played on the CPU, as strict as their documentation: what a session asks is recorded and checked.

Device memory is host memory; a stream's work waits until the stream is synchronised; a captured stream's work waits
for the graph's launch. An engine's plan is a JSON object, `plan_of`; ONNX Runtime computes its steps.
"""

# ruff: noqa: N802, N815 - the names are CUDA's and TensorRT's

from __future__ import annotations

import ctypes
import json
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

ALIGNMENT = 256


class DataType:
    def __init__(self, dtype: type) -> None:
        self.dtype = dtype
        self.itemsize = np.dtype(dtype).itemsize


FLOAT, INT64 = DataType(np.float32), DataType(np.int64)


def plan_of(model: Path, **changes: Any) -> bytes:
    """An engine of two profiles: decode and prefill."""
    plan = {
        "model": str(model),
        "capacity": 48,
        "profiles": [
            {"batch": [1, 3], "width": [1, 6], "kept": [1, 4]},
            {"batch": [1, 3], "width": [1, 1], "kept": [1, 1]},
        ],
        "aliased": True,
        "wrong": False,
        **changes,
    }
    return json.dumps(plan).encode()


class Error(IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100


class FakeCuda(ModuleType):
    """The functions of cuda.bindings.runtime that a session calls."""

    def __init__(self, capability: tuple[int, int] = (8, 9), devices: int = 1, memory: int = 2**34) -> None:
        super().__init__("cuda.bindings.runtime")
        self.calls: Counter[str] = Counter()
        self.blocks: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.captured: list[Callable[[], None]] | None = None
        self.free_memory = memory
        self._capability, self._devices = capability, devices
        self.cudaError_t = Error
        self.cudaStreamNonBlocking = 1
        self.cudaMemcpyKind = SimpleNamespace(
            cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out", cudaMemcpyDeviceToDevice="in"
        )
        self.cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread")
        self.cudaDeviceAttr = SimpleNamespace(cudaDevAttrComputeCapabilityMajor=0, cudaDevAttrComputeCapabilityMinor=1)

    # devices
    def cudaGetDeviceCount(self) -> Any:
        return (Error.cudaSuccess, self._devices) if self._devices else (Error.cudaErrorNoDevice, None)

    def cudaDeviceGetAttribute(self, attribute: int, device: int) -> Any:
        return Error.cudaSuccess, self._capability[attribute]

    def cudaGetDeviceProperties(self, device: int) -> Any:
        return Error.cudaSuccess, SimpleNamespace(name=b"Fake L4")

    def cudaGetErrorString(self, error: int) -> Any:
        return Error.cudaSuccess, Error(error).name.encode()

    # memory
    def cudaMalloc(self, size: int) -> Any:
        self.calls["cudaMalloc"] += 1
        if size > self.free_memory:
            return Error.cudaErrorMemoryAllocation, None
        block = np.full(size + ALIGNMENT, 0xFF, np.uint8)  # not zeros: nobody may count on them
        address = -(-block.ctypes.data // ALIGNMENT) * ALIGNMENT
        self.blocks[address] = (block, size)
        return Error.cudaSuccess, address

    cudaMallocHost = cudaMalloc

    def cudaFree(self, address: int) -> Any:
        self.calls["cudaFree"] += 1
        del self.blocks[address]
        return (Error.cudaSuccess,)

    cudaFreeHost = cudaFree

    def array(self, address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """What lies there; it must be within one allocation."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        assert any(start <= address and address + size <= start + length for start, (_, length) in self.blocks.items())
        raw = (ctypes.c_ubyte * size).from_address(address)
        return np.frombuffer(memoryview(raw), dtype).reshape(shape)

    # streams
    def submit(self, work: Callable[[], None]) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        return Error.cudaSuccess, 77

    def cudaStreamDestroy(self, stream: int) -> Any:
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: str, stream: int) -> Any:
        def copy() -> None:
            self.array(target, (size,), np.uint8)[...] = self.array(source, (size,), np.uint8)

        self.submit(copy)
        return (Error.cudaSuccess,)

    def cudaMemsetAsync(self, target: int, value: int, size: int, stream: int) -> Any:
        def fill() -> None:
            self.array(target, (size,), np.uint8)[...] = value

        self.submit(fill)
        return (Error.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> Any:
        assert self.captured is None, "a stream that is captured cannot be waited for"
        while self.queue:
            self.queue.pop(0)()
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: str) -> Any:
        assert self.captured is None
        self.calls["capture"] += 1
        self.captured = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> Any:
        graph, self.captured = self.captured, None
        return Error.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: list[Any], flags: int) -> Any:
        return Error.cudaSuccess, list(graph)

    def cudaGraphLaunch(self, executable: list[Any], stream: int) -> Any:
        self.calls["launch"] += 1
        self.queue.extend(executable)
        return (Error.cudaSuccess,)

    def cudaGraphDestroy(self, graph: Any) -> Any:
        return (Error.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy


class FakeTensorRT(ModuleType):
    """A TensorRT module of either flavor, over a FakeCuda."""

    def __init__(self, cuda: FakeCuda, name: str = "tensorrt", version: str = "11.4.0.1") -> None:
        super().__init__(name)
        self.__version__ = version
        self.cuda = cuda
        self.contexts: list[FakeContext] = []
        self.refitted: list[str] = []
        self.CudaGraphStrategy = SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole")

        class ILogger:
            Severity = SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal error", WARNING="warning", INFO="info")

        self.ILogger = ILogger

    def nptype(self, dtype: DataType) -> type:
        return dtype.dtype

    def Refitter(self, engine: FakeEngine, logger: Any) -> Any:
        return SimpleNamespace(refit_cuda_engine=lambda: bool(self.refitted))

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        def refit(path: str) -> bool:
            self.refitted.append(path)
            return True

        return SimpleNamespace(refit_from_file=refit)

    def Runtime(self, logger: Any) -> Any:
        def deserialize(content: Any) -> FakeEngine | None:
            try:
                return FakeEngine(self, json.loads(bytes(content)))
            except ValueError:
                logger.log("error", "Magic tag does not match")
                return None

        return SimpleNamespace(deserialize_cuda_engine=deserialize, logger=logger)


class FakeEngine:
    def __init__(self, trt: FakeTensorRT, plan: dict[str, Any]) -> None:
        self.trt, self.plan = trt, plan
        self.model = onnxruntime.InferenceSession(plan["model"], providers=["CPUExecutionProvider"])
        self.shapes = {tensor.name: tensor.shape for tensor in (*self.model.get_inputs(), *self.model.get_outputs())}
        self.num_optimization_profiles = len(plan["profiles"])
        self.weight_streaming_budget_v2 = 0

    def get_weight_streaming_automatic_budget(self) -> int:
        return 4096

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        profile = self.plan["profiles"][index]
        second = {"input_ids": "width", "logits_indices": "kept"}[name]
        least, most = ([profile["batch"][end], profile[second][end]] for end in (0, 1))
        return [least, most, most]

    def get_tensor_shape(self, name: str) -> list[int]:
        symbols = {"capacity": self.plan["capacity"]}
        return [symbols.get(dim, -1) if isinstance(dim, str) else dim for dim in self.shapes[name]]

    def get_tensor_dtype(self, name: str) -> DataType:
        return INT64 if name in ("input_ids", "write_indices", "logits_indices") else FLOAT

    def get_aliased_input_tensor(self, name: str) -> str | None:
        aliased = self.plan["aliased"] and name.startswith("present")
        return name.replace("present", "past_key_values") if aliased else None

    def create_runtime_config(self) -> SimpleNamespace:
        return SimpleNamespace(
            cuda_graph_strategy="none", create_runtime_cache=lambda: "cache", set_runtime_cache=lambda cache: True
        )

    def create_execution_context(self, config: Any = None) -> FakeContext:
        self.trt.contexts.append(FakeContext(self, config))
        return self.trt.contexts[-1]


class FakeContext:
    def __init__(self, engine: FakeEngine, config: Any) -> None:
        self.engine, self.config, self.profile = engine, config, engine.plan["profiles"][0]
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.calls: list[str] = []

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.calls.append(f"profile {index}")
        self.profile = self.engine.plan["profiles"][index]
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, high = self.profile["batch"]
        fits = low <= shape[0] <= high
        if name in ("input_ids", "logits_indices"):
            low, high = self.profile["width" if name == "input_ids" else "kept"]
            fits = fits and low <= shape[1] <= high
        elif name.startswith("past"):
            fits = fits and list(shape[1:]) == self.engine.get_tensor_shape(name)[1:]
        self.calls.append("shape")
        self.shapes[name] = tuple(shape)
        return fits

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.calls.append("address")
        self.addresses[name] = address
        return address % ALIGNMENT == 0

    def execute_async_v3(self, stream: int) -> bool:
        assert stream, "the default stream"
        assert set(self.addresses) == set(self.engine.shapes), "an address is missing"
        self.calls.append("execute")
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        self.engine.trt.cuda.submit(lambda: self._run(shapes, addresses))
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine, cuda = self.engine, self.engine.trt.cuda
        feeds = {
            name: cuda.array(addresses[name], shape, engine.get_tensor_dtype(name).dtype)
            for name, shape in shapes.items()
        }
        ends = feeds["write_indices"] + shapes["input_ids"][1]
        assert ends.max() <= engine.plan["capacity"], "TensorRT would drop this write in silence"
        names = [output.name for output in engine.model.get_outputs()]
        for name, value in zip(names, engine.model.run(names, feeds), strict=True):
            if name.startswith("present"):
                assert addresses[name] == addresses[name.replace("present", "past_key_values")]
            wrong = engine.plan["wrong"] and name == "logits"
            cuda.array(addresses[name], value.shape, value.dtype)[...] = value + 1 if wrong else value
