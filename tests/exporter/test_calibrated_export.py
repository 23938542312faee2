"""Exports that choose by a text: which text and which of it, what stays of the work, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from checkpoints import SMALL, write_checkpoint
from divergence import divergence
from refusals import assert_tells, snapshot
from rescaled import rescale_channels, rescaled, write_texts

from exporter.checkpoint import Checkpoint
from exporter.cli import run
from exporter.evaluate.rounded import rounded_weights
from exporter.evaluation_text import read_tokens
from exporter.export import ExportOptions, export
from exporter.plan import make_plan, sample_of
from exporter.scaling import SCALING, Scaling
from exporter.verify import gate
from runtime import load
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.manifest import MODEL

AWARE = ExportOptions(precision="int4", recipe="aware", calibration_tokens=2048, eval_tokens=512)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "texts")
    write_texts(directory, SMALL["vocab_size"], 4096)
    return directory


def exported(checkpoint: Path, place: Path, options: ExportOptions = AWARE, **changes: Any) -> Bundle:
    return Bundle.open(export(checkpoint, place, replace(options, **changes)).bundle)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_bundle_of_scaled_channels_and_chosen_codes_is_the_checkpoint_rounded_and_runs(
    checkpoint: Path, tmp_path: Path, quick: None
) -> None:
    bundle = exported(checkpoint, tmp_path / "bundle")
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration.methods == ("scaling", "gptq")
    assert bundle.manifest.calibration.text == "calibration.txt"
    assert bundle.manifest.calibration.tokens == 2048
    assert bundle.manifest.parity is not None
    strict = [c for c in bundle.manifest.parity.comparisons if c.metric == "max_abs" and c.case != "8-bit products"]
    assert max(c.limit for c in strict) == 1e-4
    original = Checkpoint.open(checkpoint)
    scaling = Scaling.load(bundle.path, original.spec)
    assert len(scaling.factors) == 4 * SMALL["num_hidden_layers"] + 1
    for name, read in rounded_weights(ir.load(bundle.file(MODEL)).graph, scaling).items():
        weight = original.read(name)
        assert torch.corrcoef(torch.stack([read().flatten(), weight.flatten()]))[0, 1] > 0.98
    assert divergence(bundle) < 0.8 * divergence(exported(checkpoint, tmp_path / "plain", recipe="plain"))
    assert load(bundle.path).generate("t5 t7", max_new_tokens=3).sequences[0].token_ids


def test_no_scale_of_a_checkpoints_channels_makes_the_choice_worse(
    checkpoint: Path, tmp_path: Path, quick: None
) -> None:
    other = rescaled(checkpoint, tmp_path / "rescaled", rescale_channels)
    plain = exported(other, tmp_path / "plain", recipe="plain")
    original, chosen = (exported(path, tmp_path / f"{path.name}-bundle") for path in (checkpoint, other))
    assert divergence(plain) > 10 * divergence(original)  # what such channels do to a plain grid
    assert divergence(chosen) < 1.05 * divergence(original)


def test_8_bit_grids_take_factors_and_the_nearest_codes(checkpoint: Path, tmp_path: Path, quick: None) -> None:
    text = "block = 32\nsymmetric = true\n"
    plain, aware = (
        exported(checkpoint, tmp_path / name, precision="int8", recipe=write(tmp_path / f"{name}.toml", text + more))
        for name, more in (("plain", ""), ("aware", 'method = "gptq"\nscaling = true\n'))
    )
    assert divergence(aware) < 1.1 * divergence(plain)


def test_factors_and_codes_are_each_of_use_alone(checkpoint: Path, tmp_path: Path, quick: None) -> None:
    codes = exported(checkpoint, tmp_path / "codes", recipe=write(tmp_path / "codes.toml", 'method = "gptq"\n'))
    assert not codes.has(SCALING)
    factors = exported(checkpoint, tmp_path / "factors", recipe=write(tmp_path / "factors.toml", "scaling = true\n"))
    assert (factors.path / SCALING).is_file()
    assert divergence(codes) < divergence(exported(checkpoint, tmp_path / "plain", recipe="plain"))


def test_a_tied_head_is_rounded_as_its_rows_are_looked_up(tmp_path: Path, quick: None) -> None:
    tied = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    write_texts(tied, SMALL["vocab_size"], 4096)
    plain, aware = (exported(tied, tmp_path / recipe, recipe=recipe) for recipe in ("plain", "aware"))
    assert "lm_head" not in Scaling.load(aware.path, Checkpoint.open(tied).spec).factors
    assert divergence(aware) < divergence(plain)


def test_what_a_recipe_keeps_whole_is_scaled_but_not_rounded(checkpoint: Path, tmp_path: Path, quick: None) -> None:
    """TensorRT takes no blocks of 64 in a matrix of 96 input features: that one stays in fp16."""
    layers = '[layers]\n"*.down_proj" = "fp16"\n"lm_head" = "fp16"\n'
    recipe = write(tmp_path / "mine.toml", f'block = 64\nmethod = "gptq"\nscaling = true\n{layers}')
    bundle = exported(checkpoint, tmp_path / "bundle", target="tensorrt", recipe=recipe)
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization.matrices == {"int4": 10}
    assert bundle.manifest.calibration is not None
    assert bundle.manifest.calibration.methods == ("scaling", "gptq", "fp16 range")
    factors = Scaling.load(bundle.path, Checkpoint.open(checkpoint).spec).factors
    assert not [name for name in factors if name.endswith("down_proj") or name == "lm_head"]
    assert gate(bundle, Checkpoint.open(checkpoint), network=True).parity.passed


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        {"hidden_act": "gelu", "attention_bias": True},
        {"hidden_act": "relu", "mlp_bias": True},
    ],
    ids=str,
)
def test_other_structures_are_scaled_and_pass_the_gate(config: dict[str, Any], tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", num_hidden_layers=1, **config)
    write_texts(other, SMALL["vocab_size"])
    bundle = exported(other, tmp_path / "bundle")
    assert bundle.manifest.quality is not None
    assert 0 < divergence(bundle) < 0.3
    scaled = Scaling.load(bundle.path, Checkpoint.open(other).spec).factors
    assert ("model.layers.0.mlp.down_proj" in scaled) == (config.get("hidden_act") != "gelu")


def test_the_same_seed_makes_the_same_bundle_and_another_seed_another(
    checkpoint: Path, tmp_path: Path, quick: None
) -> None:
    options = replace(AWARE, calibration_tokens=256, verify=False)
    for name, seed in (("first", 0), ("again", 0), ("other", 1)):
        bundle = exported(checkpoint, tmp_path / name, options, calibration_seed=seed)
        assert bundle.manifest.calibration is not None
        assert (bundle.manifest.calibration.seed, bundle.manifest.calibration.tokens) == (seed, 256)
    first, again, other = (snapshot(tmp_path / name) for name in ("first", "again", "other"))
    assert first.keys() == again.keys() == other.keys()
    different = {name for name in first if first[name] != again[name]}
    assert different <= {"manifest.json"}  # it tells when it was made
    assert other[f"{MODEL}.data"] != first[f"{MODEL}.data"]
    assert other[SCALING] != first[SCALING]


def test_no_scratch_is_left_in_a_bundle_nor_beside_it(checkpoint: Path, tmp_path: Path, quick: None) -> None:
    place = tmp_path / "place"
    bundle = exported(checkpoint, place / "bundle", verify=False)
    there = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*")}
    assert there == {*bundle.manifest.files, "manifest.json"}
    assert SCALING in there
    assert [path.name for path in place.iterdir()] == ["bundle"]


def test_the_sample_is_windows_of_the_checkpoints_own_text_in_their_order(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    options = replace(AWARE, calibration_tokens=1000)
    plan = make_plan(options, opened)
    sample = sample_of(options, plan, opened)
    assert sample is not None
    assert sample.text == "calibration.txt"
    assert sample.tokens.shape == (15, 64)  # max_position_embeddings is a window
    tokens = read_tokens(checkpoint / "calibration.txt", checkpoint)
    every = [tokens[at : at + 64] for at in range(0, len(tokens) - 63, 64)]
    places = [every.index(window.tolist()) for window in sample.tokens]
    assert places == sorted(set(places))
    assert places != list(range(15))  # from all of the text, not its beginning
    again = sample_of(options, plan, opened)
    assert again is not None
    np.testing.assert_array_equal(again.tokens, sample.tokens)
    everything = sample_of(replace(options, calibration_tokens=10**9), plan, opened)
    assert everything is not None
    np.testing.assert_array_equal(everything.tokens, every)


def test_a_text_of_ones_own_is_read_in_place_of_the_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    opened, path = Checkpoint.open(checkpoint), tmp_path / "mine.txt"
    path.write_text("t7 " * 200)
    options = replace(AWARE, calibration=path)
    sample = sample_of(options, make_plan(options, opened), opened)
    assert sample is not None
    assert (sample.text, set(sample.tokens.flatten().tolist())) == ("mine.txt", {7})


def short(options: ExportOptions) -> str:
    return f"{options.target} {options.precision} {options.recipe or 'plain'}{'' if options.fp16_safe else ' unsafe'}"


def directory(path: Path) -> None:
    path.mkdir()


def content(data: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(data)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda path: None, "is missing"),
        (directory, "cannot read"),
        (content(b""), "is empty"),
        (content(b" \n\n"), "is empty"),
        (content(b"t5 \0 t6" * 100), "NUL"),
        (content(b"t5 \xff t6" * 100), "not UTF-8"),
        (content(b"t5 t6 " * 31), "less than one window of 64"),
    ],
)
@pytest.mark.parametrize(
    "options", [AWARE, ExportOptions(precision="fp16"), ExportOptions(target="tensorrt", precision="fp8")], ids=short
)
def test_a_text_that_cannot_be_calibrated_on_is_refused_before_any_work(
    options: ExportOptions, prepare: Callable[[Path], Any], words: str, checkpoint: Path, tmp_path: Path, untraced: None
) -> None:
    path = tmp_path / "mine.txt"
    prepare(path)
    with pytest.raises(UserError) as refusal:
        exported(checkpoint, tmp_path / "bundle", options, calibration=path)
    assert_tells(refusal.value, path, words)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    "options",
    [
        ExportOptions(),
        ExportOptions(precision="bf16"),
        ExportOptions(precision="int4"),
        ExportOptions(precision="fp16", fp16_safe=False),
        ExportOptions(target="tensorrt", precision="fp8", fp16_safe=False),
    ],
    ids=short,
)
def test_a_text_where_nothing_is_chosen_by_one_is_refused(
    options: ExportOptions, checkpoint: Path, tmp_path: Path, untraced: None
) -> None:
    with pytest.raises(UserError) as refusal:
        exported(checkpoint, tmp_path / "bundle", options, calibration=checkpoint / "calibration.txt")
    assert_tells(refusal.value, "--calibration")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("data", "words"), [(b"", "is empty"), (b"t5 \0", "NUL"), (b"\xff", "not UTF-8")])
def test_such_a_text_ends_the_command_with_one_line(
    data: bytes, words: str, checkpoint: Path, tmp_path: Path, untraced: None, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "mine.txt"
    text.write_bytes(data)
    options = ["--precision", "int4", "--recipe", "aware", "--calibration", str(text)]
    assert run(["export", str(checkpoint), str(tmp_path / "bundle"), *options]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "mine.txt" in line]
    assert len(told) == 1
    assert words in told[0]


def test_a_method_that_there_is_not_ends_the_command_with_those_there_are(
    checkpoint: Path, tmp_path: Path, untraced: None, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write(tmp_path / "mine.toml", 'method = "magic"\n')
    arguments = [str(checkpoint), str(tmp_path / "bundle"), "--precision", "int4", "--recipe", recipe]
    assert run(["export", *arguments]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "magic" in line]
    assert len(told) == 1
    assert "known: nearest, gptq" in told[0]


def test_balanced_is_of_another_target(checkpoint: Path, tmp_path: Path, untraced: None) -> None:
    with pytest.raises(UserError) as refusal:
        exported(checkpoint, tmp_path / "bundle", target="tensorrt", recipe="balanced")
    assert_tells(refusal.value, "balanced")
