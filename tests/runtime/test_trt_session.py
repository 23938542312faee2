"""A session over an engine, on a strict fake of TensorRT and CUDA that computes with ONNX Runtime: buffers, call order,
cuts, refusals. What TensorRT itself computes only a GPU can tell: benchmarks/gpu_check.py.
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import FakeContext, FakeCuda, FakeEngine, FakeTensorRT, plan_of

from runtime import load
from runtime.bundle import Bundle, describe_files
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden, GoldenStep, prove, selftest
from runtime.manifest import GOLDEN, MODEL, Engine
from runtime.ort_session import OrtSession
from runtime.session import open_session
from runtime.trt_session import TrtSession

CAPACITY, BATCH, WIDTH, KEPT = 48, 3, 6, 4


@dataclass
class Machine:
    """A machine with a GPU, and a bundle with engines on it."""

    cuda: FakeCuda
    trt: FakeTensorRT
    path: Path

    @property
    def bundle(self) -> Bundle:
        return Bundle.open(self.path)

    def add_engine(self, plan: bytes | None = None, **changes: Any) -> None:
        """Put an engine into the bundle as `build` does."""
        manifest = self.bundle.manifest
        flavor, version = changes.get("flavor", "tensorrt"), changes.get("version", "11.4.0.1")
        name = f"engines/{flavor}-{version}-sm89/model.plan"
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(plan or plan_of(self.path / MODEL))
        fields = {
            "path": name, "flavor": "tensorrt", "version": "11.4.0.1", "capabilities": ("8.9",),
            "max_batch_size": BATCH, "max_input_len": WIDTH, "max_seq_len": CAPACITY, "max_kept": KEPT,
            "precision": "fp32", "causality": "lower-right", "graph_sha256": manifest.files[MODEL].sha256,
        }  # fmt: skip
        engines = (*manifest.engines, Engine(**(fields | changes)))
        replace(manifest, engines=engines, files=describe_files(self.path)).save(self.path)

    def context(self, width: int) -> FakeContext:
        """The one that runs steps of this width."""
        (found,) = [c for c in self.trt.contexts if c.profile["width"][1] == width]
        return found


@pytest.fixture
def bare(tensorrt_bundle_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Without an engine yet."""
    cuda = FakeCuda()
    trt = FakeTensorRT(cuda)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return Machine(cuda, trt, Path(shutil.copytree(tensorrt_bundle_of("fp32"), tmp_path / "bundle")))


@pytest.fixture
def machine(bare: Machine) -> Machine:
    bare.add_engine()
    return bare


def session_of(machine: Machine, **options: Any) -> TrtSession:
    return TrtSession(machine.bundle, **({"slots": BATCH} | options))


def tokens_of(*lengths: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(3, 2048, (len(lengths), max(lengths)))
    return tokens, np.array(lengths)


def both(machine: Machine, steps: list[tuple[Any, ...]]) -> None:
    """The same steps give the same logits on ONNX Runtime."""
    ours, theirs = session_of(machine), OrtSession(machine.bundle, slots=BATCH, capacity=CAPACITY)
    for seed, (lengths, past, slots, keep) in enumerate(steps):
        step = (*tokens_of(*lengths, seed=seed), np.array(past), np.array(slots), keep)
        np.testing.assert_allclose(ours.step(*step), theirs.step(*step), atol=1e-4)


def test_prefill_chunk_and_decode_of_unequal_rows_are_the_graphs(machine):
    both(
        machine,
        [
            ((5, 2, 6), (0, 0, 0), (0, 1, 2), 3),
            ((1, 1, 1), (5, 2, 6), (0, 1, 2), 1),
            ((4,), (3,), (1,), 2),
            ((1, 1), (6, 7), (0, 1), 1),
            ((1, 3), (7, 7), (2, 0), 1),  # slots out of order
        ],
    )


def test_a_prompt_beyond_the_profile_runs_in_chunks(machine):
    both(machine, [((20, 3, 13), (0, 0, 0), (0, 1, 2), 1), ((9, 1), (20, 13), (0, 2), 1)])
    widths = {shape[1] for c in machine.trt.contexts for name, shape in c.shapes.items() if name == "input_ids"}
    assert max(widths) <= WIDTH


@pytest.mark.parametrize("keep", [4, 5, 9, 13])
def test_more_logits_than_the_profile_keeps_come_all_the_same(machine, keep):
    both(machine, [((13, 4, 8), (0, 0, 0), (0, 1, 2), keep)])


def test_padding_does_not_pass_the_engines_capacity(machine):
    """The fake fails the step where TensorRT would drop the write."""
    both(machine, [((46, 3), (0, 0), (0, 1), 1), ((1, 6), (46, 3), (0, 1), 1), ((1, 1), (47, 9), (0, 1), 1)])
    with pytest.raises(UserError, match="row 0: 48 cached and 1 new tokens pass the capacity of 48"):
        session_of(machine).step(*tokens_of(1), np.array([48]))


def test_past_and_present_are_one_address_and_nothing_is_allocated_by_a_step(machine):
    session = session_of(machine)
    session.step(*tokens_of(4, 4), np.zeros(2, int))
    allocated = machine.cuda.calls["cudaMalloc"]
    for past in (4, 5, 6):
        session.step(*tokens_of(1, 1), np.full(2, past))
    session.step(*tokens_of(2), np.array([0]), np.array([2]))
    assert machine.cuda.calls["cudaMalloc"] == allocated
    for context in machine.trt.contexts:
        for name, address in context.addresses.items():
            if name.startswith("past"):
                assert context.addresses[name.replace("past_key_values", "present")] == address


def test_decoding_is_captured_the_second_time_and_then_only_launched(machine):
    session = session_of(machine)
    session.step(*tokens_of(4, 4), np.zeros(2, int))
    for past in (4, 5, 6, 7):
        session.step(*tokens_of(1, 1), np.full(2, past))
    assert machine.cuda.calls["capture"] == 1
    assert machine.cuda.calls["launch"] == 3
    assert machine.context(1).calls.count("execute") == 2  # one plain, one captured
    assert machine.context(WIDTH).calls.count("execute") == 1
    session.step(*tokens_of(1), np.array([8]))  # another batch has a context and a graph of its own
    session.step(*tokens_of(1, 1), np.full(2, 8))
    assert machine.cuda.calls["launch"] == 4


def test_captured_steps_give_what_plain_ones_give(machine):
    both(machine, [((3, 2), (0, 0), (0, 1), 1), *(((1, 1), (3 + n, 2 + n), (0, 1), 1) for n in range(5))])
    assert machine.cuda.calls["launch"] == 4


def test_the_next_generation_finds_the_cache_empty_and_the_graph_captured(machine):
    session = session_of(machine)
    first = session.step(*tokens_of(4), np.array([0]))
    for past in (4, 5):
        session.step(*tokens_of(1), np.array([past]))
    allocated, captured = machine.cuda.calls["cudaMalloc"], machine.cuda.calls["capture"]
    other = session.reopen(slots=1, capacity=20)
    del session
    gc.collect()
    np.testing.assert_array_equal(other.step(*tokens_of(4), np.array([0])), first)
    other.step(*tokens_of(1), np.array([4]))
    assert (machine.cuda.calls["cudaMalloc"], machine.cuda.calls["capture"]) == (allocated, captured)


def test_two_sessions_of_one_engine_do_not_see_each_others_cache(machine):
    one = session_of(machine)
    two = one.reopen(slots=1, capacity=CAPACITY)
    alone = OrtSession(machine.bundle, slots=1, capacity=CAPACITY)
    for past, seed in ((0, 1), (4, 2), (5, 3), (6, 4)):
        step = (*tokens_of(4 if past == 0 else 1, seed=seed), np.array([past]))
        two.step(tokens_of(*step[1], seed=seed + 50)[0], *step[1:])
        np.testing.assert_allclose(one.step(*step), alone.step(*step), atol=1e-4)


def test_the_gpus_memory_is_given_back(machine):
    session = session_of(machine)
    session.step(*tokens_of(4), np.array([0]))
    del session
    gc.collect()
    assert not machine.cuda.blocks


def test_logits_belong_to_the_caller(machine):
    session = session_of(machine)
    first = session.step(*tokens_of(3), np.array([0]))
    kept = first.copy()
    session.step(*tokens_of(3, seed=5), np.array([0]))
    np.testing.assert_array_equal(first, kept)


def test_rtx_captures_by_itself_and_has_one_profile(bare, monkeypatch):
    rtx = FakeTensorRT(bare.cuda, "tensorrt_rtx", "1.7.1.116")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    plan = plan_of(bare.path / MODEL, profiles=[{"batch": [1, BATCH], "width": [1, WIDTH], "kept": [1, KEPT]}])
    bare.add_engine(plan, flavor="tensorrt-rtx", version="1.7.1.116")
    both(bare, [((5, 2), (0, 0), (0, 1), 1), *(((1, 1), (5 + n, 2 + n), (0, 1), 1) for n in range(3))])
    assert {context.config.cuda_graph_strategy for context in rtx.contexts} == {"whole"}
    assert bare.cuda.calls["capture"] == 0
    assert session_of(bare).backend == "tensorrt-rtx"


def test_text_is_what_onnxruntime_says(machine):
    options: Any = {"greedy": True, "max_new_tokens": 12}
    prompts = ["Mars", "The Moon is"]
    ours, theirs = (load(machine.path, backend=b).generate(prompts, **options) for b in ("auto", "onnxruntime"))
    assert (ours.backend, theirs.backend) == ("tensorrt", "onnxruntime-cpu")
    assert [row.token_ids for row in ours.sequences] == [row.token_ids for row in theirs.sequences]


def test_text_ends_where_the_engines_capacity_does(machine):
    (row,) = load(machine.path).generate("Mars is", greedy=True, ignore_eos=True).sequences  # 256 tokens by default
    assert row.finish_reason == "length"
    assert row.prompt_tokens + len(row.token_ids) == CAPACITY + 1  # the last one need not be cached
    with pytest.raises(UserError, match=r"max_length should be within 1..48, what .* has on tensorrt; found 49"):
        load(machine.path).generate("Mars is", max_length=49)


# Which engine, and why not.


def test_auto_takes_the_engine_for_this_gpu_and_says_so(machine):
    session = open_session(machine.path)
    assert isinstance(session, TrtSession)
    assert "engines/tensorrt-11.4.0.1-sm89/model.plan is for this GPU, Fake L4" in session.choice
    assert "compute capability 8.9" in session.device


def test_auto_falls_back_to_onnxruntime_and_says_why(bare):
    def choice(**options: Any) -> str:
        session = open_session(bare.path, capacity=8, **options)
        assert session.backend == "onnxruntime-cpu"
        return session.choice

    assert "has no TensorRT engine; run nemotron-export build" in choice()
    assert choice(backend="onnxruntime") == ""
    bare.add_engine(capabilities=("9.0",))
    assert "is for compute capability 9.0, this GPU (Fake L4) has 8.9" in choice()
    bare.add_engine()
    assert "--device cpu" in choice(device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"capabilities": ("9.0", "12.0")}, r"compute capability 9.0, 12.0, this GPU .* has 8.9; run nemotron"),
        ({"version": "11.3.0"}, r"built by tensorrt 11.3.0, installed is 11.4.0.1; run .* --flavor tensorrt --force"),
        ({"graph_sha256": "0"}, r"built from another graph than this bundle's; run nemotron-export build .* --force"),
        ({"max_batch_size": 8}, r"up to \(3, 6, 48\), its record says \(8, 6, 48\); run nemotron-export build"),
        ({"plan": b"no plan"}, r"model.plan cannot be loaded \(Magic tag does not match\); run nemotron-export build"),
    ],
)  # fmt: skip
def test_an_engine_that_does_not_fit_is_refused_with_the_command_that_builds_one(bare, changes, message):
    bare.add_engine(**changes)
    with pytest.raises(UserError, match=message) as caught:
        open_session(bare.path, backend="tensorrt")
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
def test_what_an_engine_was_built_to_bear_is_honoured(bare, changes, works):
    bare.add_engine(**changes)
    assert (open_session(bare.path, capacity=8).backend == "tensorrt") == works
    assert bare.trt.refitted == ([str(bare.path / MODEL)] if changes.get("flags") == ("strip",) else [])


def test_an_engine_that_would_copy_its_cache_is_refused(bare):
    bare.add_engine(plan_of(bare.path / MODEL, aliased=False))
    with pytest.raises(UserError, match=r"does not update past_key_values.0.key in place; run nemotron-export build"):
        session_of(bare)


def test_what_the_engine_was_not_built_for_is_refused(machine):
    with pytest.raises(UserError, match=r"a batch of 4 passes the 3 of .* --max-batch-size 4 --force"):
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


def test_an_engine_that_computes_something_else_is_refused_every_time(bare):
    bare.add_engine(plan_of(bare.path / MODEL, wrong=True))
    with_golden(bare)
    for _ in range(2):
        with pytest.raises(CheckFailed, match=r"on tensorrt 11.4.0.1 is not the exported model: logits of 'prefill'"):
            load(bare.path)
    bundle = bare.bundle
    prove(bundle, OrtSession(bundle, slots=1, capacity=1))  # the graph itself is right


# The fake is no fiction.


def test_everything_asked_of_the_fake_exists_in_the_real_bindings():
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra rtx")
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-python")
    own = {name for name in vars(FakeCuda) if name.startswith("cuda") and name != "cuda"}
    assert not {name for name in own if not hasattr(runtime, name)}
    for fake, real in ((FakeEngine, trt.ICudaEngine), (FakeContext, trt.IExecutionContext)):
        asked = {name for name in vars(fake) if not name.startswith("_")}
        assert not {name for name in asked if not hasattr(real, name)}
    assert trt.nptype(trt.DataType.INT64) is np.int64
    assert trt.DataType.BF16.itemsize == 2
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE is not None
    assert hasattr(trt.Runtime, "deserialize_cuda_engine")
    assert hasattr(trt.Runtime, "logger")
    assert hasattr(trt.Refitter, "refit_cuda_engine")
    assert hasattr(trt.OnnxParserRefitter, "refit_from_file")
