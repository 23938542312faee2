"""The check of a GPU machine, on ONNX Runtime and on the fake of TensorRT: it must be right before it is needed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_ort_cuda import play_cuda
from fake_tensorrt import FakeCuda, plan_of

import benchmarks.__main__ as bench
from benchmarks import gpu_check, gpu_report
from exporter.export import ExportOptions, export
from runtime.bundle import Bundle
from runtime.cuda import Cuda, Gpu
from runtime.ort_session import OrtSession


class SeesAhead:
    """A session whose attention counts its corner from the capacity: a prompt's tokens see those after them."""

    def __init__(self, session: OrtSession) -> None:
        self._session = session

    def reopen(self, **options: int) -> SeesAhead:
        return SeesAhead(self._session.reopen(**options))

    def step(self, tokens: Any, lengths: Any, past: Any, keep: int = 1) -> Any:
        last = self._session.step(tokens, lengths, past)
        return np.repeat(last, keep, 1)


@pytest.fixture
def session(tensorrt_bundle_of: Callable[[str], Path]) -> OrtSession:
    return OrtSession(Bundle.open(tensorrt_bundle_of("fp32")), slots=1, capacity=8)


def test_the_first_case_tells_the_two_readings_of_lower_right_apart(session):
    assert gpu_check.causality_error(session) < 1e-4
    assert gpu_check.causality_error(SeesAhead(session)) > 1  # type: ignore[arg-type]


def test_greedy_tokens_are_compared_with_the_cpus(session, tensorrt_bundle_of):
    assert gpu_check.compare_greedy(Bundle.open(tensorrt_bundle_of("fp32")), session) == "32/32"


@pytest.mark.slow
def test_captured_steps_are_compared_with_those_that_are_not(tiny_checkpoint, tmp_path, monkeypatch):
    recipe = tmp_path / "int4-fp16.toml"
    recipe.write_text('activations = "fp16"\n')
    options = ExportOptions(precision="int4", recipe=str(recipe), fp16_safe=False, verify=False)
    path = export(tiny_checkpoint, tmp_path / "bundle", options).bundle
    monkeypatch.setattr(gpu_check, "PREFILL_TOKENS", 8)
    play_cuda(monkeypatch)
    assert gpu_check.backends(path) == ["onnxruntime", gpu_check.CAPTURED]
    results = [gpu_check.check(path, backend, 1e9) for backend in gpu_check.backends(path)]
    assert [(r.backend, r.uncaptured_equal, r.failure) for r in results] == [
        ("onnxruntime-cuda", "", ""),
        ("onnxruntime-cuda, captured", "32/32", ""),
    ]
    assert all(result.passed for result in results)
    results[1].uncaptured_equal = "31/32"
    assert not results[1].passed


def test_times_are_of_one_prefill_and_one_token(session):
    prefill, decode = gpu_check.times(session)
    assert prefill > decode > 0


def test_the_table_and_the_json_say_whether_the_assumption_holds(tmp_path, capsys):
    right = gpu_report.Result("b", "fp16", "tensorrt", "11.4", causality_error=0.01, decode_ms=1.5)
    wrong = gpu_report.Result("b", "fp16", "tensorrt-rtx", "1.7", causality_error=3.0)
    failed = gpu_report.Result("b", "bf16", "tensorrt", failure="no engine")
    gpu_report.report(Gpu("NVIDIA L4", "8.9"), 3e11, [right, wrong, failed], tmp_path)
    (path,) = tmp_path.glob("gpu-nvidia-l4-*.json")
    written = json.loads(path.read_text())
    assert written["verdicts"]["tensorrt fp16"].startswith("tensorrt 11.4 fp16: holds: lower-right causality counts")
    assert "DOES NOT HOLD, build with --causality mask" in written["verdicts"]["tensorrt-rtx fp16"]
    assert "not settled (no engine)" in written["verdicts"]["tensorrt bf16"]
    assert [row["passed"] for row in written["results"]] == [True, False, False]
    out = capsys.readouterr().out
    assert "300 GB/s" in out
    assert "WRONG" in out


def test_a_machine_with_a_gpu_gets_its_table_and_its_json(gpu_host, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    profiles = [
        {"batch": [1, 1], "width": [1, 128], "kept": [1, 4]},
        {"batch": [1, 1], "width": [1, 1], "kept": [1, 1]},
    ]
    plan = plan_of(gpu_host.path / "model.onnx", capacity=256, profiles=profiles)
    gpu_host.add_engine(plan, max_batch_size=1, max_input_len=128, max_seq_len=256)
    bandwidth = gpu_check.copy_bandwidth(Cuda(), 2**16)
    assert bandwidth > 0
    monkeypatch.setattr(gpu_check, "copy_bandwidth", lambda cuda: bandwidth)
    assert gpu_check.main([str(gpu_host.path), "--results", str(tmp_path / "results")]) == 0
    (path,) = (tmp_path / "results").iterdir()
    (result,) = json.loads(path.read_text())["results"]
    assert (result["backend"], result["greedy_equal"], result["passed"]) == ("tensorrt", "32/32", True)
    outcome = capsys.readouterr()
    assert "tensorrt 11.4.0.1 fp32: holds: lower-right causality counts from key_value_lengths" in outcome.out
    assert outcome.err.startswith("skipped: tensorrt-rtx for ")
    assert not [engine for engine in gpu_host.bundle.manifest.engines if engine.flavor != "tensorrt"]  # a copy was used


def test_the_assumption_is_the_one_that_engines_record():
    from plugins.tensorrt_network import LENGTHS_ASSUMPTION

    assert gpu_report.ASSUMPTION == LENGTHS_ASSUMPTION


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda(devices=0))
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err == (
        "error: no NVIDIA GPU is visible here; run this on the machine that serves, and see nvidia-smi\n"
    )


def test_make_bench_lists_what_there_is_and_is_content_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda(devices=0))
    assert bench.main() == 0
    assert "python -m benchmarks.gpu_check" in capsys.readouterr().out
