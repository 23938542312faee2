"""A session on a GPU, on a strict fake of ONNX Runtime's CUDA provider; the oracle is the session on the CPU."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from fake_ort_cuda import OrtValue, Session, play_cuda

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.ort_session import OrtSession
from runtime.session import open_session

PROMPTS, LENGTHS = np.array([[5, 6, 7, 8, 9], [9, 10, 0, 0, 0], [3, 4, 5, 0, 0]]), np.array([5, 2, 3])
ONE = np.ones(3, np.int64)


@pytest.fixture(autouse=True)
def cuda(monkeypatch: pytest.MonkeyPatch) -> type[Session]:
    return play_cuda(monkeypatch)


@pytest.fixture
def on_cpu(tiny_bundle: Path) -> OrtSession:
    return OrtSession(Bundle.open(tiny_bundle), slots=4, capacity=20)


def on_gpu(bundle: Path, capture: bool = True) -> OrtSession:
    return OrtSession(Bundle.open(bundle), device="cuda", slots=4, capacity=20, capture=capture)


def same(session: OrtSession, other: OrtSession, *step: np.ndarray, **options: object) -> None:
    actual, expected = (one.step(*step, **options) for one in (session, other))  # type: ignore[arg-type]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("capture", [False, True])
def test_decode_steps_on_a_gpu_are_the_cpus_and_neither_allocate_nor_bind(
    tiny_bundle: Path, on_cpu: OrtSession, capture: bool
) -> None:
    gpu = on_gpu(tiny_bundle, capture)
    (model,) = Session.made
    same(gpu, on_cpu, PROMPTS, LENGTHS, LENGTHS * 0)
    same(gpu, on_cpu, PROMPTS[:, :1], ONE, LENGTHS)
    made, bound = OrtValue.made.copy(), model.calls["bind"]
    for step in range(1, 6):
        same(gpu, on_cpu, PROMPTS[:, :1] + step, ONE, LENGTHS + step)
    assert (made, bound) == (OrtValue.made, model.calls["bind"])
    np.testing.assert_allclose(gpu.cache.read(1)[0][0, :, :11], on_cpu.cache.read(1)[0][0, :, :11], atol=1e-5)


def test_a_step_is_captured_once_and_prompts_never(tiny_bundle: Path, on_cpu: OrtSession) -> None:
    gpu = on_gpu(tiny_bundle)
    same(gpu, on_cpu, PROMPTS, LENGTHS, LENGTHS * 0)
    for step in range(3):
        same(gpu, on_cpu, PROMPTS[:, :1] + step, ONE, LENGTHS + step)
    same(gpu, on_cpu, PROMPTS[:1], ONE[:1] * 5, LENGTHS[:1] * 0, slots=np.array([3]))  # a new request
    same(gpu, on_cpu, PROMPTS[:, :1], ONE, LENGTHS + 3)
    same(gpu, on_cpu, PROMPTS[:, :1], ONE, LENGTHS + 4, keep=2)
    (model,) = Session.made
    assert model.calls - type(model.calls)(bind=10**9) == {"run": 3, "capture": 1, "replay": 3}


def test_other_rows_and_other_caches_have_graphs_of_their_own(tiny_bundle: Path, on_cpu: OrtSession) -> None:
    """A graph knows addresses: replayed for other rows it would write into these."""
    gpu = on_gpu(tiny_bundle)
    (model,) = Session.made
    for one, other in ((gpu, on_cpu), (gpu.reopen(slots=4, capacity=20), on_cpu.reopen(slots=4, capacity=20))):
        same(one, other, PROMPTS, LENGTHS, LENGTHS * 0)
        for step in range(2):
            same(one, other, PROMPTS[:, :1], ONE, LENGTHS + 2 * step)
            same(one, other, PROMPTS[1:, :1], ONE[1:], LENGTHS[1:] + 2 * step + 1, slots=np.array([1, 2]))
    assert model.calls["capture"] == model.calls["replay"] == 4
    assert len(model.graphs) == 4
    del one
    gc.collect()
    assert len(model.graphs) == 2  # those of the cache that is gone have gone with it


def test_a_graph_that_cannot_be_captured_is_refused_with_the_way_without(bundle_dir: Path) -> None:
    """The toy bundle's contract mixes what shapes give with what the mask gives."""
    with pytest.raises(UserError, match=r"refuses to capture .*model.onnx: .*; export .* or open it without capture"):
        on_gpu(bundle_dir)
    assert on_gpu(bundle_dir, capture=False).step(PROMPTS, LENGTHS, LENGTHS * 0).shape == (3, 1, 320)


def test_a_capture_that_fails_names_the_way_without(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "refuses_captures", True)
    gpu = on_gpu(tiny_bundle)
    gpu.step(PROMPTS, LENGTHS, LENGTHS * 0)
    with pytest.raises(UserError, match=r"cannot capture a step .*not permitted when stream is capturing; open it wit"):
        gpu.step(PROMPTS[:, :1], ONE, LENGTHS)


def test_nothing_is_captured_in_silence_where_nothing_can_be(tiny_bundle: Path, tensorrt_bundle: Path) -> None:
    with pytest.raises(UserError, match=r"target onnxruntime on --device cuda, .* on cpu; open it without capture"):
        open_session(tiny_bundle, capture=True)
    with pytest.raises(UserError, match=r"of target tensorrt, on cuda; open it without capture"):
        open_session(tensorrt_bundle, backend="onnxruntime", device="cuda", capture=True)


def test_the_fake_refuses_what_onnx_runtime_would_do_wrong_in_silence(tiny_bundle: Path) -> None:
    value = OrtValue.ortvalue_from_numpy(np.zeros((2, 3), np.int64), "cuda", 0)
    with pytest.raises(RuntimeError, match="does not match the size"):
        value.update_inplace(np.zeros((2, 2), np.int64))
    with pytest.raises(AssertionError, match="read past the array"):
        value.update_inplace(np.zeros((2, 3), np.int32))
    gpu = on_gpu(tiny_bundle)
    gpu.step(PROMPTS[:, :1], ONE, ONE - 1)
    (bound,) = gpu._bindings.values()
    bound._binding.bind_ortvalue_input("input_ids", OrtValue(np.zeros((3, 1), np.int64), "cuda"))  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match="replay the addresses and shapes of the capture"):
        gpu.step(PROMPTS[:, :1], ONE, ONE)
