"""What is compared is what its name says: by transformers' whole model, and by numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from transformers import NemotronForCausalLM

from exporter.checkpoint import Checkpoint
from exporter.diagnose import taps
from exporter.diagnose.ours import BundleRun
from exporter.diagnose.rotation import powers
from exporter.evaluate.segments import Segments
from exporter.scaling import Scaling
from runtime.bundle import Bundle
from runtime.manifest import MODEL

ROW = [1, 319, 383, 361, 786, 282, 265]


@pytest.fixture(scope="module")
def found(tiny_bundle: Path, tiny_checkpoint: Path) -> list[dict[str, np.ndarray]]:
    """Every layer's taps of the bundle."""
    bundle, checkpoint = Bundle.open(tiny_bundle), Checkpoint.open(tiny_checkpoint)
    run = BundleRun(bundle, Scaling.load(bundle.path, checkpoint.spec), ROW)
    return [{tap: value.numpy() for tap, value in run.advance(layer).items()} for layer in range(4)]


def test_every_tap_of_every_layer_is_there_for_either_target(tiny_bundle: Path, tensorrt_bundle: Path) -> None:
    for path in (tiny_bundle, tensorrt_bundle):
        bundle = Bundle.open(path)
        model = ir.load(bundle.file(MODEL))
        segments = Segments(bundle, evaluate=True, model=model)
        names = [segments.stream_name(layer) for layer in range(5)]
        for layer in taps.find_taps(model.graph, names):
            assert {*layer, taps.K_CACHED, taps.V_CACHED, taps.OUTPUT} == set(taps.ORDER)


def test_layers_and_caches_are_those_of_transformers_whole_model(
    found: list[dict[str, np.ndarray]], tiny_checkpoint: Path
) -> None:
    model = NemotronForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        output = model(torch.tensor([ROW]), output_hidden_states=True, use_cache=True)
    for layer in range(3):  # transformers gives the last one's output behind the final norm
        np.testing.assert_allclose(found[layer][taps.OUTPUT], output.hidden_states[layer + 1][0], atol=1e-4)
    for layer, cached in enumerate(output.past_key_values.layers):
        np.testing.assert_allclose(found[layer][taps.K_CACHED], cached.keys[0].transpose(0, 1), atol=1e-4)
        np.testing.assert_allclose(found[layer][taps.V_CACHED], cached.values[0].transpose(0, 1), atol=1e-4)


def test_queries_after_rotation_are_the_projected_ones_rotated(found: list[dict[str, np.ndarray]]) -> None:
    frequencies = 10000.0 ** -(np.arange(0, 32, 2) / 32)
    angles = np.outer(np.arange(len(ROW)), frequencies)[:, None]
    for layer in found:
        query = layer[taps.Q].reshape(len(ROW), 4, 64)
        first, second = query[..., :16], query[..., 16:32]
        turned = (first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles))
        np.testing.assert_allclose(
            layer[taps.Q_ROTATED], np.concatenate([*turned, query[..., 32:]], -1), atol=1e-5
        )  # fmt: skip
    np.testing.assert_allclose(powers(10000.0, 32), frequencies)


def test_the_squared_relu_is_the_hidden_state_and_parts_add_up(found: list[dict[str, np.ndarray]]) -> None:
    for layer in found:
        np.testing.assert_allclose(layer[taps.HIDDEN], np.maximum(layer[taps.UP], 0) ** 2, rtol=1e-6)
        np.testing.assert_allclose(layer[taps.MIDDLE] + layer[taps.DOWN], layer[taps.OUTPUT], atol=1e-5)
