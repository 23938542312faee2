"""Exports with an int8 cache: the checkpoint's model on that grid, at fp32's limits; its cost on a text recorded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import corruptions
import numpy as np
import onnx
import pytest
from checkpoints import write_checkpoint

from exporter.export import ExportOptions, export
from exporter.verify import LIMIT, verify
from runtime import load
from runtime.bundle import Bundle
from runtime.cache_scales import CacheScales
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden, selftest
from runtime.manifest import GOLDEN, KV_SCALES
from runtime.ort_session import OrtSession

PROMPT = "Complete the paragraph: our solar system is"


@pytest.fixture
def broken(int8_cache_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may break."""
    return Path(shutil.copytree(int8_cache_bundle, tmp_path / "broken"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text for checkpoints whose words are t0, t1, …"""
    path = tmp_path / "words.txt"
    words = np.random.default_rng(0).integers(97, size=600)
    path.write_text(" ".join(f"t{word}" for word in words), encoding="utf-8")
    return path


def exported(checkpoint: Path, place: Path, text: Path, **options: Any) -> Bundle:
    chosen = {"kv_cache": "int8", "calibration": text, "eval_text": text, "eval_tokens": 256, **options}
    return Bundle.open(export(checkpoint, place, ExportOptions(**chosen)).bundle)


def test_the_trained_checkpoint_passes_at_the_limits_of_fp32(int8_cache_bundle: Path) -> None:
    parity = Bundle.open(int8_cache_bundle).manifest.parity
    assert parity is not None
    assert parity.passed
    strict = [c for c in parity.comparisons if c.metric == "max_abs" and c.case != "near ties turned"]
    assert {c.case for c in strict} == {"prefill", "chunk", "decode", "end of capacity"}
    assert {c.limit for c in strict} == {LIMIT}


def test_what_the_cache_costs_is_measured_though_weights_are_fp32(int8_cache_bundle: Path) -> None:
    quality = Bundle.open(int8_cache_bundle).manifest.quality
    assert quality is not None
    assert 1e-6 < quality.kl_mean < 1e-4  # nothing would mean that the cache was not read
    assert quality.top1 > 0.99


def test_a_token_takes_a_quarter_of_what_it_takes_in_fp32(int8_cache_bundle: Path, tiny_bundle: Path) -> None:
    rounded, exact = (Bundle.open(path) for path in (int8_cache_bundle, tiny_bundle))
    assert rounded.cache_geometry.bytes_per_token * 4 == exact.cache_geometry.bytes_per_token == 4096
    taken = [
        sum(half.nbytes for layer in range(4) for half in OrtSession(bundle, slots=3, capacity=64).cache.read(layer))
        for bundle in (rounded, exact)
    ]
    assert taken[0] * 4 == taken[1] == 3 * 64 * 4096


def test_it_generates_what_fp32_does(int8_cache_bundle: Path, tiny_bundle: Path) -> None:
    prompts = [PROMPT, "The Sun"]  # a batch of unequal rows
    texts = [
        [sequence.text for sequence in load(bundle).generate(prompts, greedy=True, max_new_tokens=48).sequences]
        for bundle in (int8_cache_bundle, tiny_bundle)
    ]
    assert texts[0] == texts[1]
    assert texts[0][0].startswith(" the family of planets")


def test_it_proves_itself_where_it_is_loaded(int8_cache_bundle: Path, tiny_checkpoint: Path) -> None:
    assert selftest(int8_cache_bundle).passed
    assert verify(int8_cache_bundle, tiny_checkpoint).passed
    assert LIMIT < Golden.load(int8_cache_bundle / GOLDEN).limit < 0.5  # near ties may round the other way elsewhere


def scale(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    array = np.ascontiguousarray(change(onnx.numpy_helper.to_array(tensor)))
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))


def swapped_heads(model: onnx.ModelProto) -> None:
    scale(model, "cache.1.key.scale", lambda scales: scales[:, ::-1])


def swapped_values(model: onnx.ModelProto) -> None:
    scale(model, "cache.3.value.scale", lambda scales: scales[:, ::-1])


def one_channel(model: onnx.ModelProto) -> None:
    def change(scales: np.ndarray) -> np.ndarray:
        scales = scales.copy()
        scales[0, 1, 0, 5] *= 1.02
        return scales

    scale(model, "cache.2.key.scale", change)


def keys_by_the_scales_of_values(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "GroupQueryAttention":
            node.input[12], node.input[13] = node.input[13], node.input[12]
            return


@pytest.mark.parametrize(
    "bug",
    [swapped_heads, swapped_values, one_channel, keys_by_the_scales_of_values, *corruptions.ALL],
    ids=lambda bug: bug.__name__,
)
def test_a_wrong_scale_or_graph_fails_the_gate(
    bug: Callable[[onnx.ModelProto], None], broken: Path, tiny_checkpoint: Path
) -> None:
    corruptions.corrupt(broken, bug)
    assert not verify(broken, tiny_checkpoint).passed


def test_heads_that_were_swapped_are_refused_where_it_is_loaded(broken: Path) -> None:
    corruptions.corrupt(broken, swapped_heads)
    with pytest.raises(CheckFailed, match="is not the exported model"):
        load(broken)


def test_rewriting_a_bundle_unchanged_still_passes(broken: Path, tiny_checkpoint: Path) -> None:
    """Otherwise the tests above could fail for how they write and not for what."""
    corruptions.corrupt(broken, lambda model: None)
    assert verify(broken, tiny_checkpoint).passed


def test_scales_of_another_model_are_named(broken: Path, tiny_checkpoint: Path) -> None:
    CacheScales(np.ones((2, 2, 4), np.float32), np.ones((2, 2, 4), np.float32)).save(broken / KV_SCALES)
    corruptions.redescribe(broken)
    with pytest.raises(UserError, match=r"kv_scales.npz has scales \(2, 2, 4\) for a cache of \(4, 2, 64\)"):
        verify(broken, tiny_checkpoint)


@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"precision": "bf16"}, {"inputs": "embeds"}], ids=str)
def test_it_goes_with_other_activations_and_inputs(
    options: dict[str, Any], small_checkpoint: Path, tmp_path: Path, text: Path, quick: None
) -> None:
    manifest = exported(small_checkpoint, tmp_path / "bundle", text, **options).manifest
    assert manifest.parity is not None
    assert manifest.parity.passed
    assert manifest.quality is not None
    assert manifest.kv_cache == "int8"
    assert manifest.calibration is not None
    assert "kv cache" in manifest.calibration.methods
    assert (manifest.calibration.text, manifest.calibration.tokens) == ("words.txt", 9 * 64)  # whole windows
    caches = {spec.dtype for spec in manifest.graph.inputs if spec.name.startswith("past")}
    assert caches == {"int8"}


def test_it_goes_with_rounded_weights(small_checkpoint: Path, tmp_path: Path, text: Path, quick: None) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text("block = 32\n", encoding="utf-8")
    bundle = exported(small_checkpoint, tmp_path / "bundle", text, precision="int4", recipe=str(recipe))
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity.passed
    assert selftest(bundle.path).passed


@pytest.mark.slow
def test_it_goes_with_rotation_ahead_of_the_attention(tmp_path: Path, text: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "narrow", head_dim=24, num_hidden_layers=1)
    bundle = exported(checkpoint, tmp_path / "bundle", text)
    assert bundle.manifest.lowering is not None
    assert bundle.manifest.lowering.fallbacks
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity.passed


def test_a_passed_limit_leaves_no_bundle(small_checkpoint: Path, tmp_path: Path, text: Path, quick: None) -> None:
    with pytest.raises(CheckFailed, match="mean KL divergence"):
        exported(small_checkpoint, tmp_path / "bundle", text, max_kl=1e-12)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt"}, "TensorRT's cache update refuses caches of 8 bits"),
        ({"cache": False}, "with a cache, this graph has none"),
        ({"task": "feature-extraction"}, "with a cache, this graph has none"),
        ({"kv_cache": "int3"}, "unknown cache 'int3'; known: int8"),
        ({"kv_cache": None}, "chooses nothing by a text"),
        ({"position_ids": True}, "neither --position-ids nor --output-hidden-states"),
        ({"output_hidden_states": True}, "neither --position-ids nor --output-hidden-states"),
        ({"calibration_tokens": 2}, "--calibration-tokens should be at least 64, one window; found 2"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(
    options: dict[str, Any], message: str, small_checkpoint: Path, tmp_path: Path, text: Path, untraced: None
) -> None:
    with pytest.raises(UserError, match=message):
        exported(small_checkpoint, tmp_path / "bundle", text, **options)
    assert not (tmp_path / "bundle").exists()
