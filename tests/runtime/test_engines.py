"""Which engine a machine gets, what is refused with which remedy, and that an engine proves itself; on the fakes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import FakeCuda, FakeTensorRT, plan_of
from gpu_machine import Machine, session_of, tokens_of

from runtime import load
from runtime.bundle import describe_files
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden, GoldenStep, prove, selftest
from runtime.manifest import GOLDEN, MODEL
from runtime.ort_session import OrtSession
from runtime.session import open_session
from runtime.trt_session import TrtSession


def test_auto_takes_the_engine_for_this_gpu_and_says_so(machine):
    session = open_session(machine.path)
    assert isinstance(session, TrtSession)
    assert "engines/tensorrt-11.4.0.1-sm89/model.plan is for this GPU, Fake L4" in session.choice
    assert "compute capability 8.9" in session.device


def test_auto_falls_back_to_onnxruntime_and_says_why(gpu_host):
    def choice(**options: Any) -> str:
        session = open_session(gpu_host.path, capacity=8, **options)
        assert session.backend == "onnxruntime-cpu"
        return session.choice

    assert "has no TensorRT engine; run nemotron-export build" in choice()
    assert choice(backend="onnxruntime") == ""
    gpu_host.add_engine(capabilities=("9.0",))
    assert "is for compute capability 9.0, this GPU (Fake L4) has 8.9" in choice()
    gpu_host.add_engine()
    assert "--device cpu" in choice(device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capabilities": ("9.0", "12.0")}, r"compute capability 9.0, 12.0, this GPU .* has 8.9; run nemotron"),
        ({"version": "11.3.0"}, r"built by tensorrt 11.3.0, installed is 11.4.0.1; run .* --flavor tensorrt --force"),
        ({"version": "11.3.0", "attention": "plugin"}, r"run .* --flavor tensorrt --attention plugin --force"),
        ({"graph_sha256": "0"}, r"built from another graph than this bundle's; run nemotron-export build .* --force"),
        ({"max_batch_size": 8}, r"up to \(3, 6, 48\), its record says \(8, 6, 48\); run nemotron-export build"),
        ({"plan": b"no plan"}, r"model.plan cannot be loaded \(Magic tag does not match\); run nemotron-export build"),
    ],
)  # fmt: skip
def test_an_engine_that_does_not_fit_is_refused_with_the_command_that_builds_one(gpu_host, changes, message):
    gpu_host.add_engine(**changes)
    with pytest.raises(UserError, match=message) as caught:
        open_session(gpu_host.path, backend="tensorrt")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "works"),
    [
        ({"capabilities": ("8.0",), "flags": ("hardware-compatible ampere-plus",)}, True),
        ({"capabilities": ("8.0",), "flags": ("hardware-compatible same-compute-capability",)}, False),
        ({"version": "11.2.0.5", "flags": ("version-compatible",)}, True),
        ({"version": "11.5.0", "flags": ("version-compatible",)}, False),
        ({"flags": ("strip",)}, True),
    ],
)
def test_what_an_engine_was_built_to_bear_is_honoured(gpu_host, changes, works):
    gpu_host.add_engine(**changes)
    assert (open_session(gpu_host.path, capacity=8).backend == "tensorrt") == works
    assert gpu_host.trt.refitted == ([str(gpu_host.path / MODEL)] if changes.get("flags") == ("strip",) else [])


def test_weights_that_were_to_stay_on_the_host_get_a_budget_on_the_gpu(gpu_host):
    gpu_host.add_engine(flags=("weight-streaming",))
    session = open_session(gpu_host.path, capacity=8)
    assert session._loaded.engine.weight_streaming_budget_v2 == 4096


def test_where_onnxruntime_cannot_take_over_the_engines_problem_is_still_named(gpu_host, monkeypatch):
    """The GPU host has no onnxruntime, and the engine is for another GPU: that is what the user can mend."""
    gpu_host.add_engine(capabilities=("9.0",))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"is for compute capability 9.0.*run nemotron-export build.*cannot take over"):
        open_session(gpu_host.path, capacity=8)


def test_an_engine_that_would_copy_its_cache_is_refused(gpu_host):
    gpu_host.add_engine(plan_of(gpu_host.path / MODEL, aliased=False))
    with pytest.raises(UserError, match=r"does not update past_key_values.0.key in place; run nemotron-export build"):
        session_of(gpu_host)


def test_what_the_engine_was_not_built_for_is_refused(machine):
    with pytest.raises(UserError, match=r"a batch of 4 passes the 3 of .* --force --max-batch-size 4"):
        session_of(machine, slots=4)
    with pytest.raises(UserError, match=r"a capacity of 49 tokens passes the 48 of .*--max-seq-len 48.*a larger one"):
        session_of(machine, capacity=49)
    machine.cuda.free_memory = 0
    with pytest.raises(UserError, match=r"cudaMallocHost failed: .*; free the GPU's memory, or build"):
        session_of(machine)


def test_what_the_machine_lacks_is_named(machine, tiny_bundle, monkeypatch):
    def refused(message: str, backend: str = "tensorrt", path: Path = machine.path) -> None:
        with pytest.raises(UserError, match=message):
            open_session(path, backend=backend)

    refused(r"is for onnxruntime; export it with --target tensorrt", path=tiny_bundle)
    refused(r"has no tensorrt-rtx engine; run nemotron-export build .* --flavor tensorrt-rtx", "tensorrt-rtx")
    with pytest.raises(UserError, match="leave out --device cpu"):
        open_session(machine.path, backend="tensorrt", device="cpu")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    refused(r"tensorrt is not installed; pip install .*'nemotron-export\[tensorrt\]'")
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(machine.cuda, version="10.16.1"))
    refused(r"tensorrt 10.16.1 is too old, 11.0 is the oldest")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", FakeCuda(devices=0))
    refused("no NVIDIA GPU is visible here; use --backend onnxruntime")
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    refused(r"cuda-python is not installed; pip install 'nemotron-export\[tensorrt\]'")


# The engine proves itself.


def with_golden(machine: Machine) -> None:
    session = OrtSession(machine.bundle, slots=4, capacity=20)
    steps = []
    for case, lengths, past, keep in (
        ("prefill", (9, 2, 5, 3), (0, 0, 0, 0), 9),
        ("decode", (1,) * 4, (9, 2, 5, 3), 1),
    ):
        tokens, counts = tokens_of(*lengths)
        fed: dict[str, Any] = {
            "tokens": tokens, "lengths": counts, "past_lengths": np.array(past), "slots": np.arange(4),
        }  # fmt: skip
        steps.append(GoldenStep.record(case, **fed, logits=session.step(*fed.values(), keep)))
    Golden(slots=4, capacity=20, limit=1e-3, steps=steps).save(machine.path / GOLDEN)
    manifest = machine.bundle.manifest
    replace(manifest, files=describe_files(machine.path)).save(machine.path)


def test_an_engine_proves_itself_on_its_first_load_and_is_then_trusted(machine):
    with_golden(machine)  # four rows, of which the engine takes three at once
    load(machine.path)
    ran = sum(context.calls.count("execute") for context in machine.trt.contexts)
    assert ran
    load(machine.path)
    assert sum(context.calls.count("execute") for context in machine.trt.contexts) == ran
    result = selftest(machine.path)
    assert result.passed
    assert result.evaluated_by == "tensorrt 11.4.0.1"


def test_an_engine_that_computes_something_else_is_refused_every_time(gpu_host):
    gpu_host.add_engine(plan_of(gpu_host.path / MODEL, wrong=True))
    with_golden(gpu_host)
    for _ in range(2):
        with pytest.raises(CheckFailed, match=r"on tensorrt 11.4.0.1 is not the exported model: logits of 'prefill'"):
            load(gpu_host.path)
    bundle = gpu_host.bundle
    prove(bundle, OrtSession(bundle, slots=1, capacity=1))  # the graph itself is right
