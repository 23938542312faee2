"""The gate of target `tensorrt`: 16 bit is evaluated as it rounds, and judged by what it costs transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_corruptions as bugs
from checkpoints import write_checkpoint
from corruptions import corrupt, passes_gate
from safetensors.torch import load_file, save_file

from exporter.checkpoint import Checkpoint
from exporter.evaluate.session import evaluate_graph
from exporter.export import ExportOptions, export
from exporter.verify import LIMIT, run_gate, session_of, verify
from runtime.bundle import Bundle
from runtime.errors import CheckFailed
from runtime.golden import Golden, replay, selftest
from runtime.ort_session import OrtSession

Bundles = Callable[[str], Path]


def test_the_evaluation_in_fp32_is_transformers_at_the_fixed_limit(
    tensorrt_bundle_of: Bundles, tiny_checkpoint: Path
) -> None:
    bundle = Bundle.open(tensorrt_bundle_of("fp32"))
    parity = run_gate(bundle, Checkpoint.open(tiny_checkpoint), evaluate_graph(bundle)).parity
    assert parity.passed
    assert {c.limit for c in parity.comparisons if c.metric == "max_abs"} == {LIMIT}
    assert parity.evaluated_by.startswith("nemotron-export evaluation of the ONNX graph")


def test_the_evaluation_knows_the_graphs_of_the_other_target(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert run_gate(bundle, Checkpoint.open(tiny_checkpoint), evaluate_graph(bundle)).parity.passed


def test_the_evaluation_in_fp32_is_onnxruntime(tensorrt_bundle_of: Bundles) -> None:
    bundle = Bundle.open(tensorrt_bundle_of("fp32"))
    sessions = [OrtSession(bundle, slots=3, capacity=12), evaluate_graph(bundle).reopen(slots=3, capacity=12)]
    tokens = np.random.default_rng(0).integers(bundle.vocab_size, size=(3, 6))
    for lengths, past in (([6, 2, 4], [0, 0, 0]), ([1, 5, 2], [6, 2, 4]), ([5, 1, 6], [7, 7, 6])):
        theirs, ours = (s.step(tokens, np.array(lengths), np.array(past), keep=2) for s in sessions)
        np.testing.assert_allclose(ours, theirs, atol=LIMIT)
    np.testing.assert_allclose(sessions[1].cache.read(3)[0], sessions[0].cache.read(3)[0], atol=LIMIT)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_right_export_in_16_bit_passes_with_room_and_its_golden_cases_hold(
    precision: str, tensorrt_bundle_of: Bundles, tiny_checkpoint: Path
) -> None:
    bundle = Bundle.open(tensorrt_bundle_of(precision))
    session = session_of(bundle)
    result = run_gate(bundle, Checkpoint.open(tiny_checkpoint), session)
    assert result.parity.passed
    assert "evaluation" in result.parity.evaluated_by
    found = {(c.name, c.case, c.metric): c for c in result.parity.comparisons}
    assert found["edges", "all", "non_finite"].value == 0
    assert found["logits", "all", "kl_mean"].value < 1e-3
    assert all(c.passed for c in replay(session.reopen(slots=3, capacity=result.golden.capacity), result.golden))


@pytest.mark.parametrize("bug", bugs.ALL, ids=lambda bug: bug.__name__)
def test_a_wrong_graph_fails_the_gate_in_fp32(
    bug: Callable[[onnx.ModelProto], None], tensorrt_bundle_of: Bundles, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tensorrt_bundle_of("fp32"), tmp_path / "copy"))
    corrupt(copy, bug)
    assert not passes_gate(copy, tiny_checkpoint)


@pytest.mark.parametrize("bug", bugs.VISIBLE_IN_16_BIT, ids=lambda bug: bug.__name__)
@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_wrong_graph_fails_the_gate_in_16_bit(
    bug: Callable[[onnx.ModelProto], None],
    precision: str,
    tensorrt_bundle_of: Bundles,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    copy = Path(shutil.copytree(tensorrt_bundle_of(precision), tmp_path / "copy"))
    corrupt(copy, bug)
    parity = verify(copy, tiny_checkpoint)
    assert not parity.passed
    assert not next(c for c in parity.comparisons if c.metric == "kl_mean").passed


def test_rewriting_a_bundle_unchanged_still_passes(
    tensorrt_bundle_of: Bundles, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Otherwise the tests above could fail for how they write and not for what."""
    copy = Path(shutil.copytree(tensorrt_bundle_of("fp16"), tmp_path / "copy"))
    corrupt(copy, lambda model: None)
    assert verify(copy, tiny_checkpoint).passed


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose relu² passes 65504, as large models' do, and is brought back by the next weight."""
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "hot")
    tensors = load_file(checkpoint / "model.safetensors")
    for name in tensors:
        if "up_proj" in name:
            tensors[name] *= 256
        if "down_proj" in name:
            tensors[name] /= 256**2
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


@pytest.fixture
def hot_bundle(overflowing: Path, quick: None, tmp_path: Path) -> Bundle:
    options = ExportOptions(target="tensorrt", precision="fp16", verify=False)
    return Bundle.open(export(overflowing, tmp_path / "hot", options).bundle)


def test_a_relu_squared_that_overflows_fp16_is_infinite_here_and_finite_on_onnxruntimes_cpu(hot_bundle: Bundle) -> None:
    tokens, one = np.arange(1, 6)[None], np.array([1])
    session = evaluate_graph(hot_bundle).reopen(slots=1, capacity=8)
    session.step(tokens, 5 * one, 0 * one)
    assert session.non_finite[0] == "pow_1"
    assert np.isfinite(OrtSession(hot_bundle, slots=1, capacity=8).step(tokens, 5 * one, 0 * one)).all()


def test_an_export_that_overflows_fp16_is_refused_with_the_tensor_and_the_remedy(
    overflowing: Path, quick: None, tmp_path: Path
) -> None:
    with pytest.raises(CheckFailed, match=r"^pow_1 is not finite in fp16.*; export with --precision bf16"):
        export(overflowing, tmp_path / "bundle", ExportOptions(target="tensorrt", precision="fp16"))
    assert not (tmp_path / "bundle").exists()


def test_the_remedy_helps_and_the_bundle_carries_the_limit_of_its_precision(
    overflowing: Path, quick: None, tmp_path: Path
) -> None:
    result = export(overflowing, tmp_path / "bundle", ExportOptions(target="tensorrt", precision="bf16"))
    parity = result.manifest.parity
    assert parity is not None
    assert parity.passed
    golden = Golden.load(result.bundle / "golden.npz")
    assert golden.limit == next(c.limit for c in parity.comparisons if c.name == "logits" and c.metric == "max_abs")
    assert golden.limit > LIMIT


def test_a_gated_fp16_bundle_proves_itself_on_onnxruntime(small_checkpoint: Path, quick: None, tmp_path: Path) -> None:
    options = ExportOptions(target="tensorrt", precision="fp16")
    assert selftest(export(small_checkpoint, tmp_path / "bundle", options).bundle, backend="onnxruntime").passed
