"""Opening a session: what is refused."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnxruntime
import pytest
from corruptions import redescribe
from fake_libcuda import play_driver
from fake_ort_cuda import play_cuda

from runtime.bundle import Bundle
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


def test_a_cuda_provider_without_a_gpu_is_told_so(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: PROVIDERS)
    play_driver(monkeypatch)
    with pytest.raises(UserError, match=r"no NVIDIA GPU that is visible here; check nvidia-smi, or use --device cpu"):
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


def test_a_cuda_provider_that_does_not_start_is_named(bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play_cuda(monkeypatch), "get_providers", lambda _: ["CPUExecutionProvider"])
    with pytest.raises(UserError, match=r"CUDAExecutionProvider did not start .* or use --device cpu"):
        OrtSession(Bundle.open(bundle_dir), device="cuda")


def test_loading_a_bundle_leaves_no_telemetry_behind(bundle_dir: Path, tmp_path: Path) -> None:
    code = f"from runtime import load; load({str(bundle_dir)!r})"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], check=True, env={**environment, "XDG_CACHE_HOME": str(tmp_path)})
    assert [entry.name for entry in tmp_path.iterdir()] == ["nemotron-export"]
