"""Graphs of whole rows: what is exported is what transformers gives through the runtime, and a wrong one is stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import corruptions
import numpy as np
import onnx
import pytest
import torch
import transformers
from checkpoints import write_checkpoint
from onnx import numpy_helper

from exporter.export import ExportOptions, export
from exporter.verify import verify
from runtime import load
from runtime.errors import CheckFailed
from runtime.golden import selftest

PAD = 3
LABELS = {0: "calm", 1: "busy", 2: "late"}
TEXTS = ["t5 t17 t9 t41", "t8", "t12 t60 t61 t7 t90 t33 t2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("rows") / "classifier",
        architecture="NemotronForSequenceClassification",
        id2label=LABELS,
        pad_token_id=PAD,
    )


@pytest.fixture(scope="module")
def classifier(checkpoint: Path) -> Path:
    return export(checkpoint, checkpoint.parent / "bundle", ExportOptions()).bundle


@pytest.fixture(scope="module")
def features(checkpoint: Path) -> Path:
    options = ExportOptions(task="feature-extraction", output_hidden_states=True)
    return export(checkpoint, checkpoint.parent / "features", options).bundle


def ids(text: str) -> torch.Tensor:
    return torch.tensor([[int(word[1:]) for word in text.split()]])


def test_classes_have_the_probabilities_of_transformers(checkpoint: Path, classifier: Path) -> None:
    model = transformers.NemotronForSequenceClassification.from_pretrained(checkpoint, attn_implementation="eager")
    for text, found in zip(TEXTS, load(classifier).classify(TEXTS), strict=True):
        with torch.no_grad():
            expected = model(ids(text)).logits[0].softmax(-1).numpy()
        scores = {label.label: label.score for label in found.labels}
        assert list(scores) == [LABELS[index] for index in np.argsort(-expected)]
        np.testing.assert_allclose([scores[name] for name in LABELS.values()], expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_embeddings_are_pooled_from_the_hidden_states_of_transformers(
    checkpoint: Path, features: Path, pooling: str
) -> None:
    model = transformers.NemotronModel.from_pretrained(checkpoint, attn_implementation="eager")
    found = load(features).embed(TEXTS, pooling=pooling)
    for text, ours in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            hidden = model(ids(text)).last_hidden_state[0]
        pooled = hidden.mean(0) if pooling == "mean" else hidden[-1]
        np.testing.assert_allclose(ours, (pooled / pooled.norm()).numpy(), atol=1e-5)


def unmask(model: onnx.ModelProto) -> None:
    """Padding is seen: what a causal mask alone does, and only rows padded on the left show."""
    last = next(node for node in model.graph.node if node.op_type == "And")
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.input[3] = last.input[0]


def look_at_another_token(model: onnx.ModelProto) -> None:
    """Another token is taken for padding."""
    for tensor in model.graph.initializer:
        if tensor.name == "contract.pad_token":
            tensor.CopyFrom(numpy_helper.from_array(np.array(96), tensor.name))


@pytest.mark.parametrize(
    "bug",
    [corruptions.drop_plus_one, unmask, look_at_another_token],
    ids=lambda bug: bug.__name__,
)
def test_a_wrong_graph_fails_the_gate_and_wherever_it_is_loaded(
    bug: Callable[[onnx.ModelProto], None], checkpoint: Path, classifier: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(classifier, tmp_path / "bundle"))
    corruptions.corrupt(bundle, bug)
    assert not verify(bundle, checkpoint).passed
    assert not selftest(bundle).passed
    with pytest.raises(CheckFailed, match="is not the exported model"):
        load(bundle)


def test_a_graph_that_does_not_run_fails_the_check_with_the_reason(
    checkpoint: Path, classifier: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(classifier, tmp_path / "bundle"))

    def gather_beyond(model: onnx.ModelProto) -> None:
        node = next(node for node in model.graph.node if node.op_type == "GatherND")
        model.graph.initializer.append(numpy_helper.from_array(np.full((3, 1, 1), 10_000), "far"))
        node.input[1] = "far"

    corruptions.corrupt(bundle, gather_beyond)
    parity = verify(bundle, checkpoint)
    assert not parity.passed
    assert "invalid index" in parity.comparisons[0].extra["reason"]


def test_hidden_states_are_handed_out_and_checked(checkpoint: Path, features: Path) -> None:
    parity = verify(features, checkpoint)
    assert parity.passed
    assert {comparison.name for comparison in parity.comparisons} == {"last_hidden_state", "hidden_states"}


@pytest.mark.slow
def test_golden_cases_of_wide_models_stay_small(tmp_path: Path) -> None:
    wide = write_checkpoint(tmp_path / "wide", architecture="NemotronModel", hidden_size=8192, num_hidden_layers=1)
    bundle = export(wide, tmp_path / "b", ExportOptions()).bundle
    assert (bundle / "golden.npz").stat().st_size < 1_000_000
    assert selftest(bundle).passed
