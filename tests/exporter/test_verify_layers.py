"""The gate and the measurement that go layer by layer say what those of the whole model say, and hold less."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corruptions
import numpy as np
import onnx
import pytest
import torch
from checkpoints import write_checkpoint

from exporter.checkpoint import Checkpoint
from exporter.evaluate import segments
from exporter.evaluate.tensors import WHOLE
from exporter.evaluation_text import default_text, read_tokens, windows
from exporter.export import ExportOptions, export
from exporter.layered_reference import LayeredReference, Weights
from exporter.quality import logits_of, measure
from exporter.quality_layers import measure_layers
from exporter.verify import gate, session_of
from exporter.verify_layers import run_layered_gate
from runtime.bundle import Bundle
from runtime.errors import CheckFailed, UserError
from runtime.golden import selftest
from runtime.ort_session import OrtSession


@pytest.fixture(autouse=True)
def _many_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of the small vocabularies of tests is cut into several runs, too."""
    monkeypatch.setattr(segments, "SLICE_BYTES", 4 * 256 * 600)


@pytest.fixture(scope="module")
def bundle_of(
    tiny_bundle: Path,
    int8_cache_bundle: Path,
    tensorrt_bundle_of: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
) -> Callable[[str], Bundle]:
    def bundle(kind: str) -> Bundle:
        if kind.startswith("tensorrt"):
            return Bundle.open(tensorrt_bundle_of(kind.removeprefix("tensorrt ")))
        if kind in {"fp32", "int8 cache"}:
            return Bundle.open(tiny_bundle if kind == "fp32" else int8_cache_bundle)
        place = tmp_path_factory.mktemp("layers") / kind
        return Bundle.open(export(tiny_checkpoint, place, ExportOptions(precision=kind, verify=False)).bundle)

    return bundle


KINDS = [
    "fp32",
    *(pytest.param(k, marks=pytest.mark.slow) for k in ("int8 cache", "tensorrt bf16", "int4", "tensorrt int4")),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_export_passes_with_differences_like_the_whole_gates(
    kind: str, bundle_of: Callable[[str], Bundle], tiny_checkpoint: Path
) -> None:
    bundle, checkpoint = bundle_of(kind), Checkpoint.open(tiny_checkpoint)
    layered, whole = run_layered_gate(bundle, checkpoint), gate(bundle, checkpoint)
    assert layered.parity.passed
    assert layered.parity.evaluated_by == f"{whole.parity.evaluated_by}, layer by layer"
    found = {(c.name, c.case, c.metric): c for c in layered.parity.comparisons}
    assert {key for key in found if key[0] == "hidden_states"} == {
        ("hidden_states", f"layer {layer}", "max_abs") for layer in range(4)
    }
    for comparison in whole.parity.comparisons:
        other = found[comparison.name, comparison.case, comparison.metric]
        if comparison.metric == "max_abs" and comparison.value:
            assert 0.1 < other.value / comparison.value < 10
            assert 0.2 < other.limit / comparison.limit < 5


def test_what_the_layered_gate_stores_proves_the_bundle_where_it_runs(
    tiny_bundle_copy: Path, tiny_checkpoint: Path
) -> None:
    result = run_layered_gate(Bundle.open(tiny_bundle_copy), Checkpoint.open(tiny_checkpoint))
    assert result.golden is not None
    result.golden.save(tiny_bundle_copy / "golden.npz")
    corruptions.redescribe(tiny_bundle_copy)
    assert selftest(tiny_bundle_copy).passed


@pytest.mark.slow
def test_stored_cases_are_those_of_transformers_whole_model(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    from transformers import NemotronForCausalLM

    golden = run_layered_gate(Bundle.open(tiny_bundle), Checkpoint.open(tiny_checkpoint)).golden
    assert golden is not None
    prefill = golden.steps[0]
    model = NemotronForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    row = prefill.tokens[2][: prefill.lengths[2]]
    with torch.no_grad():
        logits = model(torch.tensor(row[None])).logits[0, -1].numpy()
    np.testing.assert_allclose(prefill.top_logits[2, -1], np.sort(logits)[::-1][:16], atol=1e-5)


WRONG, *OTHERS = corruptions.ALL


@pytest.mark.parametrize(
    "bug", [WRONG, *(pytest.param(bug, marks=pytest.mark.slow) for bug in OTHERS)], ids=lambda bug: bug.__name__
)
def test_a_wrong_graph_fails_layer_by_layer_too(
    bug: Callable[[onnx.ModelProto], None], tiny_bundle_copy: Path, tiny_checkpoint: Path
) -> None:
    corruptions.corrupt(tiny_bundle_copy, bug)
    assert not run_layered_gate(Bundle.open(tiny_bundle_copy), Checkpoint.open(tiny_checkpoint)).parity.passed


def test_the_report_says_at_which_layer_a_difference_begins(tiny_bundle_copy: Path, tiny_checkpoint: Path) -> None:
    def double_bias(model: onnx.ModelProto) -> None:
        bias = next(i for i in model.graph.initializer if i.name == "model.layers.2.input_layernorm.bias")
        array = onnx.numpy_helper.to_array(bias)
        bias.CopyFrom(onnx.numpy_helper.from_array(array * 2 + 0.1, bias.name))

    corruptions.corrupt(tiny_bundle_copy, double_bias)
    found = run_layered_gate(Bundle.open(tiny_bundle_copy), Checkpoint.open(tiny_checkpoint)).parity.comparisons
    passed = [c.passed for c in found if c.name == "hidden_states"]
    assert passed == [True, True, False, False]


def test_each_layer_is_read_once_and_the_head_in_runs(
    tiny_bundle: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[str] = Counter()
    read, most = Weights.read, 0

    def counted(self: Weights, name: str, rows: slice = WHOLE) -> Any:
        nonlocal most
        reads[name] += 1
        found = read(self, name, rows)
        if name in {"lm_head.weight", "model.embed_tokens.weight"}:
            most = max(most, len(found))
        return found

    monkeypatch.setattr(Weights, "read", counted)
    run_layered_gate(Bundle.open(tiny_bundle), Checkpoint.open(tiny_checkpoint))
    layers = {name: count for name, count in reads.items() if name.startswith("model.layers.")}
    assert len(layers) == 4 * 10
    assert set(layers.values()) == {1}
    assert most <= 600


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [3, 11])
def test_models_of_very_short_context_fit(tmp_path: Path, max_length: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "short", num_hidden_layers=2, max_position_embeddings=max_length)
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(verify=False)).bundle
    assert run_layered_gate(Bundle.open(bundle), Checkpoint.open(checkpoint)).parity.passed


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [pytest.param("int4", True), pytest.param("int4", False, marks=pytest.mark.slow), ("tensorrt bf16", False)],
)
def test_a_precision_costs_the_same_measured_layer_by_layer(
    kind: str, kernels: bool, bundle_of: Callable[[str], Bundle], tiny_checkpoint: Path
) -> None:
    bundle, checkpoint = bundle_of(kind), Checkpoint.open(tiny_checkpoint)
    path = default_text("heldout.txt", tiny_checkpoint)
    tokens = windows(read_tokens(path, tiny_checkpoint), 32, 128, path)
    session = OrtSession(bundle) if kernels else session_of(bundle)
    whole = measure(checkpoint, logits_of(session), tokens, text="heldout.txt")
    layered = measure_layers(bundle, checkpoint, tokens, text="heldout.txt", kernels=kernels)
    for field in dataclasses.fields(whole):
        expected, found = getattr(whole, field.name), getattr(layered, field.name)
        assert found == (pytest.approx(expected, rel=1e-4) if isinstance(expected, float) else expected)


def test_logits_that_are_no_number_are_not_a_quality(tiny_bundle_copy: Path, tiny_checkpoint: Path) -> None:
    def overflow(model: onnx.ModelProto) -> None:
        bias = next(i for i in model.graph.initializer if i.name == "model.norm.bias")
        array = onnx.numpy_helper.to_array(bias)
        bias.CopyFrom(onnx.numpy_helper.from_array(array + np.float32(np.inf), bias.name))

    corruptions.corrupt(tiny_bundle_copy, overflow)
    bundle = Bundle.open(tiny_bundle_copy)
    with pytest.raises(CheckFailed, match="window 0 of the text: logits of the bundle are not finite"):
        measure_layers(bundle, Checkpoint.open(tiny_checkpoint), np.ones((1, 4), int), text="x", kernels=True)


def test_an_export_that_the_memory_does_not_hold_whole_is_checked_layer_by_layer(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.reference.Reference.load", lambda *_: pytest.fail("the whole model was loaded"))
    options = ExportOptions(precision="bf16", memory=720_000_000, eval_tokens=256)
    manifest = export(tiny_checkpoint, tmp_path / "bundle", options).manifest
    assert manifest.parity is not None
    assert manifest.parity.evaluated_by.endswith(", layer by layer")
    assert manifest.quality is not None
    assert manifest.quality.kl_mean < 1e-3


@pytest.mark.parametrize("beyond", [{"cache": False}, {"output_hidden_states": True}, {"position_ids": True}], ids=str)
@pytest.mark.usefixtures("untraced")
def test_what_cannot_go_by_layers_is_refused_before_any_work(
    beyond: dict[str, bool], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"holds the whole model: 7\d\d.\d MB of memory, and 720.0 MB are there"):
        export(tiny_checkpoint, tmp_path / "bundle", ExportOptions(memory=720_000_000, **beyond))
    assert not (tmp_path / "bundle").exists()


def test_a_failed_export_says_at_which_layer(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = LayeredReference.advance

    def off(self: LayeredReference, stored: dict[str, torch.Tensor], *args: Any) -> Any:
        name = "post_attention_layernorm.bias"
        return advance(self, {**stored, name: stored[name] + 1}, *args)

    monkeypatch.setattr(LayeredReference, "advance", off)
    with pytest.raises(CheckFailed, match="hidden_states of layer 0 first"):
        export(tiny_checkpoint, tmp_path / "bundle", ExportOptions(memory=720_000_000))
    assert not (tmp_path / "bundle").exists()


def test_a_checkpoint_of_another_shape_is_named_before_any_layer_runs(tiny_bundle: Path, tmp_path: Path) -> None:
    other = Checkpoint.open(write_checkpoint(tmp_path / "other", num_hidden_layers=1))
    with pytest.raises(UserError, match="are not of one model"):
        gate(Bundle.open(tiny_bundle), other, layered=True)
