"""The graph contract of target `onnxruntime`, asked of the exported graph with plain onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from cuda_placement import Placement
from transformers import NemotronForCausalLM

from exporter.lowering import lower
from exporter.passes import pipeline, run
from exporter.rope import rope_tables
from runtime.errors import UserError

LAYERS, KV_HEADS, HEAD_DIM = 4, 2, 64
PROMPTS = [[1, 319, 301, 16, 379, 18, 285], [1, 417, 266]]


@pytest.fixture(scope="module")
def graph(tiny_bundle: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(tiny_bundle / "model.onnx", options)


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Path) -> list[np.ndarray]:
    """transformers' logits of each prompt alone, float32 [sequence, vocab]."""
    model = NemotronForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0].numpy() for prompt in PROMPTS]


def feed(tokens: np.ndarray, mask: np.ndarray, past: list[np.ndarray] | None = None) -> dict[str, Any]:
    batch = len(tokens)
    empty = [np.zeros((batch, KV_HEADS, 0, HEAD_DIM), np.float32)] * (2 * LAYERS)
    names = [f"past_key_values.{layer}.{half}" for layer in range(LAYERS) for half in ("key", "value")]
    return {"input_ids": tokens, "attention_mask": mask, **dict(zip(names, past or empty, strict=True))}


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    width = max(map(len, PROMPTS))
    rows = [np.pad(row, (0, width - len(row)) if side == "right" else (width - len(row), 0)) for row in PROMPTS]
    ones = [np.ones(len(row), np.int64) for row in PROMPTS]
    masks = [np.pad(row, (0, width - len(row)) if side == "right" else (width - len(row), 0)) for row in ones]
    return np.stack(rows), np.stack(masks)


def test_only_the_last_real_token_has_logits_unless_more_are_asked_for(
    graph: onnxruntime.InferenceSession, expected: list[np.ndarray]
) -> None:
    logits = graph.run(["logits"], feed(*padded("right")))[0]
    assert logits.shape == (2, 1, 2048)
    np.testing.assert_allclose(logits[:, 0], [row[-1] for row in expected], atol=1e-4)


def test_more_logits_are_the_last_of_each_row(graph: onnxruntime.InferenceSession, expected: list[np.ndarray]) -> None:
    logits = graph.run(["logits"], feed(*padded("right")) | {"logits_to_keep": np.array([3])})[0]
    np.testing.assert_allclose(logits, [row[-3:] for row in expected], atol=1e-4)


def test_a_left_padded_row_gets_nan_and_its_neighbour_does_not_suffer(
    graph: onnxruntime.InferenceSession, expected: list[np.ndarray]
) -> None:
    logits = graph.run(["logits"], feed(*padded("left")))[0]
    assert np.isnan(logits[1]).all()
    np.testing.assert_allclose(logits[0, 0], expected[0][-1], atol=1e-4)


def test_a_growing_cache_works_for_consumers_that_share_no_buffer(
    graph: onnxruntime.InferenceSession, expected: list[np.ndarray]
) -> None:
    prompt, past = np.array([PROMPTS[0]]), None
    for chunk in ([0, 1, 2], [3, 4], [5], [6]):
        tokens = prompt[:, chunk]
        logits, *past = graph.run(None, feed(tokens, np.ones((1, chunk[-1] + 1), np.int64), past))
        assert past[0].shape == (1, KV_HEADS, chunk[-1] + 1, HEAD_DIM)
        np.testing.assert_allclose(logits[0, 0], expected[0][chunk[-1]], atol=1e-4)


def test_the_graph_passes_onnx_checker(tiny_bundle: Path) -> None:
    onnx.checker.check_model(tiny_bundle / "model.onnx", full_check=False)


def fused(traced: Any, **config: Any) -> Any:
    spec, model = traced(**config)
    run(pipeline(spec, *rope_tables(spec, spec.max_positions)), model)
    return model


def test_lowering_again_changes_nothing(traced: Any) -> None:
    model = fused(traced)
    lower(model, "onnxruntime", 2)
    before = [(node.op_type, [v.name if v else None for v in node.inputs]) for node in model.graph]
    assert lower(model, "onnxruntime", 2).attention == "GroupQueryAttention"
    assert [(node.op_type, [v.name if v else None for v in node.inputs]) for node in model.graph] == before


@pytest.mark.parametrize("config", [{}, {"partial_rotary_factor": 0.75}], ids=["rotation inside", "rotation apart"])
def test_nothing_is_copied_between_host_and_device_which_would_keep_steps_from_being_captured(
    traced: Any, config: dict[str, Any]
) -> None:
    model = fused(traced, num_hidden_layers=1, **config)
    lower(model, "onnxruntime", 1)
    placement = Placement(ir.to_proto(model).graph)
    assert placement.copies == []
    assert placement.inputs_on_host == {"logits_to_keep"}


def test_an_unknown_target_lists_the_known(traced: Any) -> None:
    with pytest.raises(UserError, match="unknown target 'openvino'; known: onnxruntime"):
        lower(fused(traced), "openvino", 2)


def test_a_rotary_width_that_the_attention_cannot_rotate_is_told_by_number(traced: Any) -> None:
    lowered = lower(fused(traced, partial_rotary_factor=0.75, num_hidden_layers=1), "onnxruntime", 1)
    assert lowered.attention == "GroupQueryAttention"
    assert len(lowered.fallbacks) == 1
    assert "rotary_dim 24" in lowered.fallbacks[0]


def test_a_head_width_that_the_attention_does_not_take_is_refused_with_what_takes_it(traced: Any) -> None:
    with pytest.raises(
        UserError, match=r"head width 20 is not a multiple of 8.* --no-cache, or with --target tensorrt"
    ):
        lower(fused(traced, head_dim=20, num_hidden_layers=1), "onnxruntime", 1)


def test_a_layer_that_was_not_lowered_stops_the_export(traced: Any) -> None:
    with pytest.raises(UserError, match="2 attentions for 3 layers"):
        lower(fused(traced), "onnxruntime", 3)
