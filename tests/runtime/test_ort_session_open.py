"""Opening a session: what is refused, and what happens on a GPU as far as a CPU can tell."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from corruptions import redescribe

from runtime.bundle import Bundle
from runtime.contract import past_names, present_names
from runtime.errors import UserError
from runtime.manifest import Quantization
from runtime.ort_session import OrtSession
from runtime.session import open_session

PROVIDERS = ["CUDAExecutionProvider", "CPUExecutionProvider"]


def test_a_number_that_cannot_be_is_named(bundle_dir: Path) -> None:
    with pytest.raises(UserError, match=r"a capacity of 97 tokens passes the 96 of .*; ask for less"):
        open_session(bundle_dir, capacity=97)
    with pytest.raises(UserError, match="a cache of 0 slots"):
        open_session(bundle_dir, slots=0)
    with pytest.raises(UserError, match="threads should be at least 1, not 0"):
        open_session(bundle_dir, threads=0)
    with pytest.raises(UserError, match="unknown backend 'onnx'; known: auto, onnxruntime, tensorrt, tensorrt-rtx"):
        open_session(bundle_dir, backend="onnx")
    with pytest.raises(UserError, match="unknown device 'tpu'; known: cpu, cuda"):
        open_session(bundle_dir, device="tpu")


@pytest.mark.parametrize(("field", "value"), [("task", "question-answering"), ("target", "openvino")])
def test_a_bundle_for_something_else_is_refused(bundle_dir: Path, field: str, value: str) -> None:
    bundle = Bundle.open(bundle_dir)
    other = replace(bundle, manifest=replace(bundle.manifest, **{field: value}))
    with pytest.raises(UserError, match=f"is for {value}; export it with --{field}"):
        open_session(other)


def test_a_graph_that_does_not_load_is_named(bundle_copy: Path) -> None:
    model = bundle_copy / "model.onnx"
    model.write_bytes(b"\x08" + model.read_bytes()[1:200])
    redescribe(bundle_copy)
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(UserError, match=r"onnxruntime .* cannot load .*model.onnx: .*selftest"):
        open_session(bundle)


def test_without_onnxruntime_both_extras_are_named(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"'nemotron-export\[cpu\]' .*'nemotron-export\[gpu\]'"):
        open_session(bundle_dir)


def test_without_its_cuda_provider_the_extra_is_named(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match=r"no CUDAExecutionProvider; .*'nemotron-export\[gpu\]', or use --device cpu"):
        OrtSession(Bundle.open(bundle_dir), device="cuda")


def test_fp32_attention_does_not_silently_leave_the_gpu(bundle_dir: Path) -> None:
    with pytest.raises(UserError, match=r"CUDA takes 16 bit only: .* use --device cpu"):
        open_session(bundle_dir, device="cuda")


@pytest.mark.parametrize(
    ("activations", "message"), [("fp32", "fp32 activations, .* 16 bit only"), ("fp16", "no CUDA")]
)
def test_on_a_gpu_activations_decide_not_the_name_of_the_precision(
    bundle_dir: Path, activations: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    bundle = Bundle.open(bundle_dir)
    rounded = Quantization(recipe="plain", activations=activations, matrices={"int4": 14})
    manifest = replace(bundle.manifest, precision="int4", quantization=rounded)
    with pytest.raises(UserError, match=message):
        open_session(replace(bundle, manifest=manifest), device="cuda")


@pytest.fixture
def cuda_played_by_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Device memory is the host's, the CUDA provider the CPU's; the list gets the names bound on the device."""
    bound: list[str] = []
    allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type

    class Binding(onnxruntime.IOBinding):
        def bind_input(self, name: str, device: str, *args: Any) -> None:
            super().bind_input(name, self._host(name, device), *args)

        def bind_output(self, name: str, device: str, *args: Any) -> None:
            super().bind_output(name, self._host(name, device), *args)

        def _host(self, name: str, device: str) -> str:
            bound.extend([name] if device == "cuda" else [])
            return "cpu"

    class Model(onnxruntime.InferenceSession):
        def __init__(self, path: Path, options: Any, providers: list[str]) -> None:
            assert providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]
            super().__init__(path, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def io_binding(self) -> Binding:
            return Binding(self)

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", Model)
    monkeypatch.setattr(
        onnxruntime.OrtValue, "ortvalue_from_shape_and_type", lambda shape, dtype, *_: allocate(shape, dtype, "cpu", 0)
    )
    return bound


def test_on_a_gpu_the_cache_stays_there_and_the_rest_is_small(
    bundle_dir: Path, session: OrtSession, cuda_played_by_cpu: list[str]
) -> None:
    on_gpu = OrtSession(Bundle.open(bundle_dir), device="cuda", slots=3, capacity=20)
    assert on_gpu.backend == "onnxruntime-cuda"
    prompts, lengths = np.array([[5, 6, 7, 8], [9, 10, 0, 0]]), np.array([4, 2])
    for tokens, new, past in ((prompts, lengths, lengths * 0), (prompts[:, :1], lengths // lengths, lengths)):
        np.testing.assert_allclose(on_gpu.step(tokens, new, past), session.step(tokens, new, past), atol=1e-5)
    caches = [name for n in range(2) for name in (*past_names(n), *present_names(n))]
    assert sorted(cuda_played_by_cpu) == sorted(caches)  # once, for both steps
    np.testing.assert_allclose(on_gpu.cache.read(1)[0][0, :, :5], session.cache.read(1)[0][0, :, :5], atol=1e-5)


def test_a_cuda_provider_that_does_not_start_is_named(
    bundle_dir: Path, cuda_played_by_cpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda _: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match=r"CUDAExecutionProvider did not start .* or use --device cpu"):
        OrtSession(Bundle.open(bundle_dir), device="cuda")


def test_loading_a_bundle_leaves_no_telemetry_behind(bundle_dir: Path, tmp_path: Path) -> None:
    code = f"from runtime import load; load({str(bundle_dir)!r})"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**environment, "XDG_CACHE_HOME": str(tmp_path)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["nemotron-export"]
