"""Recipes: a choice that the target cannot run, or a layer that is not there, is told in one line before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from exporter.recipe import Precision, Recipe, precision_of, read_recipe
from exporter.rounding import BlockInt4, BlockNBits, ChannelFp8
from runtime.errors import UserError


def write(directory: Path, text: str) -> str:
    path = directory / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_says_blocks_and_what_layers_are_kept_finer(tmp_path: Path) -> None:
    text = 'block = 64\nsymmetric = true\n[layers]\n"model.layers.0" = "int8"\n"*.down_proj" = "fp32"\n'
    # Blocks are of the precision that the export has.
    precision = precision_of("onnxruntime", "int4", read_recipe(write(tmp_path, text)))
    assert precision.rounding("model.layers.0.mlp.down_proj.weight") == BlockNBits(8, 128, True)
    assert precision.rounding("model.layers.1.mlp.down_proj.weight") is None
    assert precision.rounding("model.layers.10.mlp.up_proj.weight") == BlockNBits(4, 64, True)
    assert precision.recipe.name == "mine"


def test_presets_are_recipes_of_their_names() -> None:
    assert read_recipe(None) == Recipe()
    mixed = precision_of("onnxruntime", "int4", read_recipe("mixed"))
    assert mixed.rounding("lm_head.weight") == BlockNBits(8, 128, True)
    assert precision_of("onnxruntime", "int4", read_recipe("compact")).weights == BlockNBits(4, 128, True)


def test_only_recipes_that_choose_by_a_text_need_one(tmp_path: Path) -> None:
    plain = precision_of("onnxruntime", "int4", Recipe())
    assert plain.calibrated == ()
    aware = precision_of("onnxruntime", "int4", read_recipe("aware"))
    assert aware.calibrated == ("scaling", "gptq")
    assert aware.weights == plain.weights  # so that both take the same bytes
    balanced = precision_of("onnxruntime", "int4", read_recipe("balanced"))
    assert (balanced.calibrated, balanced.weights) == (("scaling", "gptq"), BlockNBits(4, 64, False))
    assert balanced.rounding("lm_head.weight") == BlockNBits(8, 128, True)
    for text, needs in (('method = "gptq"\n', ("gptq",)), ("scaling = true\n", ("scaling",))):
        assert precision_of("onnxruntime", "int4", read_recipe(write(tmp_path, text))).calibrated == needs


def test_fp16_activations_are_kept_in_range_by_a_text() -> None:
    assert precision_of("onnxruntime", "fp16", Recipe()).calibrated == ("fp16 range",)
    assert precision_of("tensorrt", "int4", read_recipe("aware")).calibrated == ("scaling", "gptq", "fp16 range")
    assert precision_of("onnxruntime", "bf16", Recipe()).calibrated == ()
    unsafe = replace(precision_of("onnxruntime", "fp16", Recipe()), fp16_safe=False)
    assert unsafe.calibrated == ()


def test_each_target_has_its_own_form() -> None:
    assert precision_of("tensorrt", "int4", Recipe()).weights == BlockInt4(128)
    assert precision_of("tensorrt", "fp8", Recipe()).weights == ChannelFp8()
    assert precision_of("tensorrt", "int4", Recipe()).activations == "fp16"
    assert precision_of("onnxruntime", "fp16", Recipe()) == Precision("fp16", "fp16", embedding=True)


@pytest.mark.parametrize(
    ("target", "precision", "message"),
    [
        ("tensorrt", "int8", "no precision 'int8'; known: fp32, fp16, bf16, fp8, int4; TensorRT dequantises int8"),
        ("onnxruntime", "fp8", "no precision 'fp8'; known: fp32, fp16, bf16, int8, int4"),
        ("onnxruntime", "q4", "no precision 'q4'"),
    ],
)
def test_a_precision_that_the_target_cannot_run_is_refused(target: str, precision: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        precision_of(target, precision, Recipe())


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("block = 48\n", "onnxruntime", "blocks of 48; known: 32, 64, 128"),
        ('block = "64"\n', "onnxruntime", "block should be int, found '64'"),
        ("blocks = 32\n", "onnxruntime", "'blocks'; known: activations, block, symmetric, method, scaling, layers"),
        ("block = \n", "onnxruntime", "is not TOML"),
        ('activations = "int8"\n', "onnxruntime", "'int8' for activations"),
        ('activations = "fp32"\n', "tensorrt", "fp32 activations; TensorRT takes"),
        ("block = 32\n", "tensorrt", "symmetric blocks of 64 or 128"),
        ("symmetric = false\n", "tensorrt", "symmetric blocks of 64 or 128"),
        ('method = "awq"\n', "onnxruntime", "method 'awq'; known: nearest, gptq"),
        ("method = 4\n", "onnxruntime", "method should be str, found 4"),
        ("scaling = 1\n", "onnxruntime", "scaling should be bool, found 1"),
        ('[layers]\n"lm_head" = "fp4"\n', "onnxruntime", "'fp4' for lm_head"),
        ('[layers]\n"lm_head" = "fp16"\n', "onnxruntime", "fp16 for lm_head where activations are fp32"),
        ('[layers]\n"lm_head" = 8\n', "onnxruntime", "'lm_head' should be text, found 8"),
    ],
)
def test_a_wrong_recipe_is_told_in_one_line(text: str, target: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        precision_of(target, "int4", read_recipe(write(tmp_path, text)))
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'best'; known: aware, balanced, compact, fine, mixed, plain, or a \.toml"):
        read_recipe("best")
    with pytest.raises(UserError, match="cannot read recipe"):
        read_recipe(str(tmp_path / "none.toml"))


def test_a_recipe_is_of_rounded_weights_only() -> None:
    with pytest.raises(UserError, match="--precision fp16 takes none"):
        precision_of("onnxruntime", "fp16", read_recipe("mixed"))


def test_a_layer_that_does_not_exist_is_named(tmp_path: Path) -> None:
    text = '[layers]\n"model.layers.9" = "int8"\n'
    precision = precision_of("onnxruntime", "int4", read_recipe(write(tmp_path, text)))
    with pytest.raises(UserError, match=r"recipe mine names 'model.layers.9', which is no matrix of this model"):
        precision.check_layers(["model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
