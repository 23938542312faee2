"""ONNX Runtime's CUDA provider played on the CPU, as strict as its documentation and sources.

Device memory is host memory that only device bindings may use. A session that captures refuses graphs that the real one
refuses; a captured graph replays the addresses and shapes that it was captured with, and the host's values of then.
"""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
from cuda_placement import Placement
from fake_libcuda import L4, play_driver

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
RealSession = onnxruntime.InferenceSession
RealBinding = onnxruntime.IOBinding
Fail = onnxruntime.capi.onnxruntime_pybind11_state.Fail


class OrtValue:
    """A tensor on the host or on the device."""

    live: ClassVar[weakref.WeakSet[OrtValue]] = weakref.WeakSet()
    made: ClassVar[Counter[str]] = Counter()

    def __init__(self, array: np.ndarray, device: str) -> None:
        self.array, self.device = array, device
        OrtValue.live.add(self)
        OrtValue.made[device] += 1

    @classmethod
    def ortvalue_from_numpy(cls, array: np.ndarray, device: str, index: int) -> OrtValue:
        assert index == 0
        return cls(np.array(array, order="C"), device)

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape: Any, dtype: type, device: str, index: int) -> OrtValue:
        assert index == 0
        value = cls(np.empty(shape, dtype), device)
        value.array.view(np.uint8)[...] = 0x7F  # not zeros: nobody may count on them
        return value

    def update_inplace(self, array: np.ndarray) -> None:
        if array.size != self.array.size:
            raise RuntimeError("The input size of numpy arrays does not match the size of the OrtValue.")
        assert array.shape == self.array.shape, "ONNX Runtime would keep the old shape"
        assert array.dtype == self.array.dtype, "ONNX Runtime would read past the array"
        self.array[...] = array

    def numpy(self) -> np.ndarray:
        return self.array.copy()

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def spans(self, address: int, size: int) -> bool:
        return self.data_ptr() <= address and address + size <= self.data_ptr() + self.array.nbytes


class Place:
    """Where one input or output lies."""

    def __init__(self, device: str, dtype: Any, shape: Any, address: int, value: OrtValue | None = None) -> None:
        self.device, self.dtype, self.shape, self.address = device, np.dtype(dtype), tuple(shape), address
        self.value = value  # what is bound stays alive

    @property
    def key(self) -> tuple[Any, ...]:
        return self.device, self.dtype, self.shape, self.address

    def check(self, name: str) -> None:
        size = int(np.prod(self.shape)) * self.dtype.itemsize
        owners = [value for value in OrtValue.live if value.spans(self.address, size)]
        if self.device == "cuda":
            assert any(value.device == "cuda" for value in owners), f"{name} is at no address of the device"
        else:
            assert not any(value.device == "cuda" for value in owners), f"{name} is on the device"


class Binding:
    """An IOBinding; what it is asked is recorded, and counted by its session."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.inputs: dict[str, Place] = {}
        self.outputs: dict[str, Place | None] = {}
        self.results: list[Any] = []

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: Any, address: int) -> None:
        self.session.calls["bind"] += 1
        self.inputs[name] = Place(device, dtype, shape, address)

    def bind_ortvalue_input(self, name: str, value: OrtValue) -> None:
        self.session.calls["bind"] += 1
        self.inputs[name] = Place(value.device, value.array.dtype, value.array.shape, value.data_ptr(), value)

    def bind_output(self, name: str, device: str, index: int = 0, dtype: Any = None, shape: Any = None,
                    address: int | None = None) -> None:  # fmt: skip
        self.session.calls["bind"] += 1
        self.outputs[name] = None if address is None else Place(device, dtype, shape, address)

    def bind_ortvalue_output(self, name: str, value: OrtValue) -> None:
        self.session.calls["bind"] += 1
        self.outputs[name] = Place(value.device, value.array.dtype, value.array.shape, value.data_ptr(), value)

    def get_outputs(self) -> list[Any]:
        return self.results

    def keys(self) -> dict[str, Any]:
        bound = {**self.inputs, **self.outputs}
        return {name: place and place.key for name, place in bound.items()}


class Graph:
    """A captured graph: addresses and shapes, and the host's inputs as they were."""

    def __init__(self, binding: Binding) -> None:
        self.keys = binding.keys()
        self.inputs, self.outputs = dict(binding.inputs), dict(binding.outputs)
        for name, place in binding.inputs.items():
            if place.device == "cpu":
                assert place.value is not None, f"{name} is bound by address: nothing keeps it"
                baked = OrtValue(place.value.array.copy(), "cpu")
                self.inputs[name] = Place("cpu", place.dtype, place.shape, baked.data_ptr(), baked)


class Session:
    """An InferenceSession on CUDA, or the real one on the CPU."""

    made: ClassVar[list[Session]] = []
    refuses_captures = False

    def __new__(cls, path: Any, options: Any, providers: list[Any]) -> Any:
        return RealSession(path, options, providers=providers) if providers == [CPU] else super().__new__(cls)

    def __init__(self, path: Path, options: Any, providers: list[Any]) -> None:
        first, second = providers
        self.captures = first == (CUDA, {"enable_cuda_graph": "1"})
        assert second == CPU
        assert self.captures or first == CUDA
        if self.captures:
            self.placement = Placement(onnx.load(path, load_external_data=False).graph)
            if self.placement.copies:
                raise Fail(
                    "This session cannot use the graph capture feature as requested by the user as all compute graph "
                    "nodes have not been partitioned to the CUDAExecutionProvider"
                )
        self.real = RealSession(path, options, providers=[CPU])
        self.calls: Counter[str] = Counter()
        self.graphs: dict[int, Graph] = {}
        Session.made.append(self)

    def get_providers(self) -> list[str]:
        return [CUDA, CPU]

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, binding: Binding, options: Any = None) -> None:
        assert not self.captures or options is not None, "graph 0 is ONNX Runtime's own"
        number = int(options.get_run_config_entry("gpu_graph_id")) if options is not None else -1
        assert number == -1 or (self.captures and number > 0)
        if number in self.graphs:
            self.calls["replay"] += 1
            graph = self.graphs[number]
            assert graph.keys == binding.keys(), "ONNX Runtime would replay the addresses and shapes of the capture"
            self._execute(graph.inputs, graph.outputs)
        elif number == -1:
            self.calls["run"] += 1
            binding.results = self._execute(binding.inputs, binding.outputs)
        else:
            self.calls["capture"] += 1
            self._capture(number, binding)

    def release_captured_graph(self, number: int) -> None:
        del self.graphs[number]

    def _capture(self, number: int, binding: Binding) -> None:
        if Session.refuses_captures:
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing")
        for name, place in {**binding.inputs, **binding.outputs}.items():
            assert place is not None, f"{name} has no address to capture"
            on_host = name in self.placement.inputs_on_host
            assert (place.device == "cpu") == on_host, f"{name} would be copied at every run"
        for _ in range(3):  # two for the memory that it needs, one that is captured
            self._execute(binding.inputs, binding.outputs)
        self.graphs[number] = Graph(binding)

    def _execute(self, inputs: dict[str, Place], outputs: dict[str, Place | None]) -> list[Any]:
        real = RealBinding(self.real)
        for name, place in inputs.items():
            place.check(name)
            real.bind_input(name, "cpu", 0, place.dtype.type, place.shape, place.address)
        for name, place in outputs.items():
            if place is None:
                real.bind_output(name, "cpu")
            else:
                place.check(name)
                real.bind_output(name, "cpu", 0, place.dtype.type, place.shape, place.address)
        self.real.run_with_iobinding(real)
        return list(real.get_outputs())


def play_cuda(monkeypatch: pytest.MonkeyPatch) -> type[Session]:
    """Put the fake into onnxruntime's place, on a machine with a GPU."""
    play_driver(monkeypatch, L4)
    monkeypatch.setattr(Session, "made", [])
    monkeypatch.setattr(OrtValue, "made", Counter())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "OrtValue", OrtValue)
    return Session
