"""A session over an engine, on a strict fake of TensorRT and CUDA that computes with ONNX Runtime: buffers, call order,
cuts, refusals. What TensorRT itself computes only a GPU can tell: benchmarks/gpu_check.py.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

import numpy as np
import pytest
from fake_tensorrt import FakeContext, FakeCuda, FakeEngine, FakeTensorRT, plan_of
from gpu_machine import BATCH, CAPACITY, KEPT, WIDTH, Machine, session_of, tokens_of

from runtime import load
from runtime.errors import UserError
from runtime.manifest import MODEL
from runtime.ort_session import OrtSession


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


def test_rtx_captures_by_itself_and_has_one_profile(gpu_host, monkeypatch):
    rtx = FakeTensorRT(gpu_host.cuda, "tensorrt_rtx", "1.7.1.116")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    plan = plan_of(gpu_host.path / MODEL, profiles=[{"batch": [1, BATCH], "width": [1, WIDTH], "kept": [1, KEPT]}])
    gpu_host.add_engine(plan, flavor="tensorrt-rtx", version="1.7.1.116")
    both(gpu_host, [((5, 2), (0, 0), (0, 1), 1), *(((1, 1), (5 + n, 2 + n), (0, 1), 1) for n in range(3))])
    assert {context.config.cuda_graph_strategy for context in rtx.contexts} == {"whole"}
    assert gpu_host.cuda.calls["capture"] == 0
    assert session_of(gpu_host).backend == "tensorrt-rtx"


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
    assert {"create_runtime_cache", "set_runtime_cache", "cuda_graph_strategy"} <= set(dir(trt.IRuntimeConfig))
    assert trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE is not None
    assert hasattr(trt.Runtime, "deserialize_cuda_engine")
    assert hasattr(trt.Runtime, "logger")
    assert hasattr(trt.Refitter, "refit_cuda_engine")
    assert hasattr(trt.OnnxParserRefitter, "refit_from_file")
