"""int8, int4 and fp8 exports: the checkpoint's own function on rounded weights, its cost measured, limits kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint

from exporter.checkpoint import Checkpoint
from exporter.evaluate.rounded import weights_of
from exporter.export import ExportOptions, export
from exporter.scaling import Scaling
from exporter.verify import gate
from runtime import load
from runtime.bundle import Bundle
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden, selftest
from runtime.manifest import GOLDEN

SMALL_BLOCKS = "block = 32\n"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.toml"
    path.write_text(SMALL_BLOCKS, encoding="utf-8")
    return str(path)


def exported(checkpoint: Path, place: Path, **options: Any) -> Bundle:
    return Bundle.open(export(checkpoint, place, ExportOptions(**{"eval_tokens": 256, **options})).bundle)


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.02), ("int4", 0.3)])
def test_an_onnxruntime_bundle_of_few_bits_is_checked_measured_and_runs(
    precision: str, most: float, small_checkpoint: Path, tmp_path: Path, recipe: str, quick: None
) -> None:
    bundle = exported(small_checkpoint, tmp_path / "bundle", precision=precision, recipe=recipe)
    manifest = bundle.manifest
    assert manifest.quantization is not None
    assert manifest.quantization.matrices == {precision: 14}  # six a layer, the embedding and the head
    assert (manifest.quantization.recipe, manifest.activations) == ("small", "fp32")
    assert manifest.parity is not None
    assert manifest.parity.passed
    strict = [c for c in manifest.parity.comparisons if c.metric == "max_abs" and c.case != "8-bit products"]
    assert max(c.limit for c in strict) == 1e-4
    assert manifest.quality is not None
    assert 0 < manifest.quality.kl_mean < most
    original = Checkpoint.open(small_checkpoint)
    for name, read in weights_of(bundle, Scaling(original.spec)).items():
        weight = original.read(name)
        assert torch.corrcoef(torch.stack([read().flatten(), weight.flatten()]))[0, 1] > 0.99
    assert selftest(bundle.path).passed
    assert Golden.load(bundle.file(GOLDEN)).limit < 1
    assert load(bundle.path).generate("t5 t7", max_new_tokens=3).sequences[0].token_ids


@pytest.mark.parametrize(
    ("options", "cases"),
    [
        ({"output_hidden_states": True}, {("hidden_states", "padded right")}),
        ({"position_ids": True}, {("logits", "given positions")}),
        ({"inputs": "embeds", "output_hidden_states": True}, {("hidden_states", "padded right")}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_a_graph_hands_out_or_takes_besides_is_checked_on_the_rounded_weights(
    options: dict[str, Any], cases: set[tuple[str, str]], small_checkpoint: Path, tmp_path: Path, quick: None
) -> None:
    blocks = tmp_path / "small.toml"
    blocks.write_text(SMALL_BLOCKS, encoding="utf-8")
    bundle = exported(small_checkpoint, tmp_path / "bundle", precision="int4", recipe=str(blocks), **options)
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity.passed
    rows = {(c.name, c.case): c.limit for c in bundle.manifest.parity.comparisons if c.metric == "max_abs"}
    assert {rows[case] for case in cases} == {1e-4}  # int4 of the checkpoint's own weights is off by far more
    assert load(bundle.path).generate("t5 t7", max_new_tokens=3).sequences[0].token_ids


def test_factors_leave_what_is_handed_out_as_it_is(small_checkpoint: Path, tmp_path: Path, quick: None) -> None:
    """Those of the head would divide the last norm's output, which is the last of the hidden states."""
    recipe = tmp_path / "scaled.toml"
    recipe.write_text(f"{SMALL_BLOCKS}scaling = true\n", encoding="utf-8")
    options = {"precision": "int4", "recipe": str(recipe), "output_hidden_states": True}
    bundle = exported(small_checkpoint, tmp_path / "bundle", **options)
    factors = Scaling.load(bundle.path, Checkpoint.open(small_checkpoint).spec).factors
    assert len(factors) == 8
    assert all(name.startswith("model.layers.") for name in factors)
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity.passed


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bit_is_for_onnxruntime_too(precision: str, small_checkpoint: Path, tmp_path: Path, quick: None) -> None:
    bundle = exported(small_checkpoint, tmp_path / "bundle", precision=precision)
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity.passed
    assert bundle.manifest.quality is not None
    assert bundle.manifest.quality.kl_mean < 1e-3
    assert bundle.cache_geometry.dtype == {"fp16": "float16", "bf16": "bfloat16"}[precision]


def test_tensorrt_takes_fp8_and_the_network_is_the_model(small_checkpoint: Path, tmp_path: Path, quick: None) -> None:
    bundle = exported(small_checkpoint, tmp_path / "bundle", target="tensorrt", precision="fp8")
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization.matrices == {"fp8": 13}  # the embedding is looked up, not multiplied
    assert gate(bundle, Checkpoint.open(small_checkpoint), network=True).parity.passed


@pytest.mark.slow
def test_tensorrt_takes_int4_of_whole_blocks_and_the_network_is_the_model(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "wide", hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    bundle = exported(checkpoint, tmp_path / "bundle", target="tensorrt", precision="int4")
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization.matrices == {"int4": 7}
    assert gate(bundle, Checkpoint.open(checkpoint), network=True).parity.passed


def test_a_tied_head_and_embedding_are_rounded_each_in_its_form(tmp_path: Path, recipe: str, quick: None) -> None:
    checkpoint = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    bundle = exported(checkpoint, tmp_path / "bundle", precision="int8", recipe=recipe)
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity.passed


def test_a_wrongly_packed_weight_is_found(
    small_checkpoint: Path, tmp_path: Path, recipe: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from exporter.rounding import VALUES, BlockNBits

    right = BlockNBits.apply

    def swapped(self: BlockNBits, matrix: torch.Tensor) -> dict[str, np.ndarray]:
        parts = right(self, matrix)
        parts[VALUES] = parts[VALUES] >> 4 | parts[VALUES] << 4
        return parts

    monkeypatch.setattr(BlockNBits, "apply", swapped)
    with pytest.raises(CheckFailed, match="KL"):
        exported(small_checkpoint, tmp_path / "bundle", precision="int4", recipe=recipe, max_kl=0.3)
    assert not (tmp_path / "bundle").exists()


def test_a_passed_limit_leaves_no_bundle(small_checkpoint: Path, tmp_path: Path, recipe: str, quick: None) -> None:
    with pytest.raises(CheckFailed, match="mean KL divergence"):
        exported(small_checkpoint, tmp_path / "bundle", precision="int4", recipe=recipe, max_kl=1e-9)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "an embedding of 64 is not a whole number of blocks of 128"),
        ({"precision": "int4", "cache": False}, "--precision int4 is of text-generation with a cache"),
        (
            {"precision": "int4", "target": "tensorrt", "output_hidden_states": True},
            "--output-hidden-states is not carried by target tensorrt for text generation with a cache",
        ),
        ({"precision": "int4", "target": "tensorrt"}, "64 input features is not a whole number of blocks of 128"),
        ({"precision": "int8", "target": "tensorrt"}, "TensorRT dequantises int8"),
        ({"precision": "fp32", "max_kl": 0.1}, "--max-kl and --max-perplexity-increase are of text generation below"),
        ({"precision": "fp16", "verify": False, "max_kl": 0.1}, "checked"),
        ({"precision": "fp16", "eval_text": Path("/nowhere/text.txt")}, "/nowhere/text.txt"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_left(
    options: dict[str, Any], message: str, small_checkpoint: Path, tmp_path: Path, quick: None
) -> None:
    with pytest.raises(UserError, match=message):
        exported(small_checkpoint, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()
