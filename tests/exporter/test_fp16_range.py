"""fp16 of a model whose layers leave its range: kept in it without a change of the function, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from checkpoints import SMALL, write_checkpoint
from refusals import assert_tells
from rescaled import Weights, powers_of_two, rescaled, write_texts
from transformers import NemotronForCausalLM

from exporter.calibration import Calibration, LayerActivations
from exporter.checkpoint import Checkpoint
from exporter.cli import run
from exporter.export import ExportOptions, export
from exporter.fp16_range import keep_in_range
from exporter.origin import Origin
from exporter.parameters import LAYERS
from exporter.scaling import DOWN, QKV, SCALING, UP, Scaling
from runtime.bundle import Bundle
from runtime.errors import CheckFailed, UserError
from runtime.manifest import MODEL

LARGEST, SMALLEST_NORMAL = 65504.0, 2.0**-14  # of fp16
LIMIT = LARGEST / 8
OPTIONS = ExportOptions(precision="fp16", calibration_tokens=1024, eval_tokens=512)
FAR = ("squares", "values", "both")


def reach_further(weights: Weights, what: str = "both") -> None:
    """relu² up to 2^12 and values up to 2^15 times as large, the function the same."""
    for seed, prefix in enumerate(weights.each_layer()):
        if what != "values":
            weights.scale_squares(prefix, powers_of_two(SMALL["intermediate_size"], 5, 6, seed))
        if what != "squares":
            weights.scale_values(prefix, powers_of_two(64, 12, 15, seed))


@pytest.fixture(scope="module")
def in_range(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "in-range")
    write_texts(checkpoint, SMALL["vocab_size"])
    return checkpoint


@pytest.fixture(scope="module")
def far(in_range: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rescaled(in_range, tmp_path_factory.mktemp("checkpoints") / "far", reach_further)


def layers_of(checkpoint: Path) -> tuple[Scaling, list[LayerActivations]]:
    opened = Checkpoint.open(checkpoint)
    windows = np.random.default_rng(0).integers(3, opened.spec.vocab, (8, 64))
    return Scaling(opened.spec), list(Calibration(opened, windows).layers())


def as_exported(checkpoint: Path, bundle: Path) -> dict[str, Any]:
    """Every matrix and norm of a bundle by the parameter's name, float32 as the checkpoint has it oriented."""
    found = {}
    for name, value in ir.load(bundle / MODEL).graph.initializers.items():
        tensor = name.removesuffix(".transposed").removesuffix(".plus_one")
        if tensor.startswith(LAYERS) and value.const_value is not None:
            array = value.const_value.numpy().astype(np.float32)
            found[tensor] = array.T if name.endswith(".transposed") else array
    return found


def test_a_model_beyond_fp16_is_refused_unless_it_is_kept_in_range(far: Path, tmp_path: Path, quick: None) -> None:
    with pytest.raises(CheckFailed, match=r"is not finite in fp16, .* export with --precision bf16"):
        export(far, tmp_path / "unsafe", replace(OPTIONS, fp16_safe=False))
    assert not (tmp_path / "unsafe").exists()
    manifest = export(far, tmp_path / "safe", OPTIONS).manifest
    assert manifest.parity is not None
    assert manifest.parity.passed
    assert manifest.quality is not None
    assert manifest.quality.kl_mean < 5e-6
    assert manifest.calibration is not None
    assert manifest.calibration.methods == ("fp16 range",)
    assert len(manifest.calibration.ranges) == SMALL["num_hidden_layers"]
    for layer in manifest.calibration.ranges:
        assert layer.before > LARGEST
        assert layer.after <= LIMIT


def test_what_is_kept_in_range_costs_no_more_than_fp16_itself(
    in_range: Path, far: Path, tmp_path: Path, quick: None
) -> None:
    qualities = [
        export(checkpoint, tmp_path / checkpoint.name, OPTIONS).manifest.quality for checkpoint in (in_range, far)
    ]
    assert qualities[0] is not None
    assert qualities[1] is not None
    assert qualities[1].kl_mean < 2 * qualities[0].kl_mean


def small_weights(weights: Weights) -> None:
    """As `reach_further` by norms that give much, so that weights are small: some are near the end of fp16's range."""
    reach_further(weights)
    for prefix in weights.each_layer():
        smaller = torch.full((SMALL["hidden_size"],), 2.0**-9)
        weights.scale_norm(f"{prefix}input_layernorm", [f"{prefix}self_attn.{name}_proj" for name in "qkv"], smaller)
        weights.scale_norm(f"{prefix}post_attention_layernorm", [f"{prefix}mlp.up_proj"], smaller)


def test_no_weight_falls_below_fp16_that_was_in_it(in_range: Path, tmp_path: Path, quick: None) -> None:
    small = rescaled(in_range, tmp_path / "small", small_weights)
    bundle = export(small, tmp_path / "bundle", replace(OPTIONS, verify=False)).bundle
    checkpoint, seen = Checkpoint.open(small), 0
    for name, after in as_exported(far, bundle).items():
        if name.endswith("_proj.weight"):
            before = checkpoint.read(name).float().numpy()
            held = np.abs(before) >= SMALLEST_NORMAL
            assert (np.abs(after[held]) >= SMALLEST_NORMAL).all(), name
            # Rounded once, from the checkpoint's number times a power of two.
            exponents = np.log2(after[held].astype(np.float64) / before[held])
            assert np.abs(exponents - exponents.round()).max() < 1e-3
            seen += 1
    assert seen == 6 * SMALL["num_hidden_layers"]


def test_a_model_in_range_is_exported_as_if_nothing_looked(in_range: Path, tmp_path: Path, quick: None) -> None:
    safe, unsafe = (
        export(in_range, tmp_path / f"{flag}", replace(OPTIONS, fp16_safe=flag, verify=False)).bundle
        for flag in (True, False)
    )
    assert (safe / f"{MODEL}.data").read_bytes() == (unsafe / f"{MODEL}.data").read_bytes()
    assert not (safe / SCALING).exists()
    ranges, none = (Bundle.open(bundle).manifest.calibration for bundle in (safe, unsafe))
    assert none is None
    assert ranges is not None
    assert all(layer.before == layer.after < LIMIT for layer in ranges.ranges)


@pytest.mark.parametrize("what", FAR)
def test_transformers_on_the_scaled_weights_stays_in_range(what: str, in_range: Path, tmp_path: Path) -> None:
    checkpoint = rescaled(in_range, tmp_path / "far", partial(reach_further, what=what))
    scaling, layers = layers_of(checkpoint)
    factors, ranges = {}, []
    for layer in layers:
        safe = keep_in_range(layer, {}, scaling)
        factors |= {f"{LAYERS}{layer.layer}.{channels}": factor for channels, factor in safe.factors.items()}
        ranges.append(safe.range)
    assert all(torch.equal(factor.log2(), factor.log2().round()) for factor in factors.values())
    before = largest_given(checkpoint, Scaling(scaling.spec))
    after = largest_given(checkpoint, Scaling(scaling.spec, factors))
    for layer in range(SMALL["num_hidden_layers"]):
        assert ranges[layer].before == pytest.approx(before[layer], rel=1e-3)
        assert ranges[layer].after == pytest.approx(after[layer], rel=1e-3)
        assert before[layer] > LARGEST
        assert after[layer] <= LIMIT


def largest_given(checkpoint: Path, scaling: Scaling) -> list[float]:
    """The largest magnitude that any module of each layer gives, by transformers' model in fp32."""
    model = NemotronForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        origin = Origin(name, plus_one=name.endswith("norm.weight"))
        parameter.data = origin.apply(parameter.data, torch.float32, scaling.apply) - float(origin.plus_one)
    found = [0.0] * model.config.num_hidden_layers

    def note(layer: int, given: Any) -> None:
        found[layer] = max(found[layer], float((given[0] if isinstance(given, tuple) else given).abs().max()))

    for index, layer in enumerate(model.model.layers):
        for module in layer.modules():
            module.register_forward_hook(lambda _, __, given, index=index: note(index, given))
    windows = np.random.default_rng(0).integers(3, model.config.vocab_size, (8, 64))
    with torch.no_grad():
        model(torch.from_numpy(windows), use_cache=False)
    return found


def test_factors_of_another_kind_are_kept_and_what_they_enlarge_is_in_range(in_range: Path) -> None:
    scaling, layers = layers_of(in_range)
    enlarge = torch.full((SMALL["intermediate_size"],), 2.0**-13)  # relu² of about 1 … 20
    columns = torch.rand(SMALL["hidden_size"]) + 0.5
    safe = keep_in_range(layers[0], {DOWN: enlarge, UP: columns, QKV: columns}, scaling)
    assert safe.range.before > LARGEST
    assert safe.range.after <= LIMIT
    assert torch.equal(safe.factors[QKV], columns)
    for channels, given in ((DOWN, enlarge), (UP, columns)):
        more = (safe.factors[channels] / given).log2()
        torch.testing.assert_close(more, more.round(), atol=1e-6, rtol=0)
        assert (more.round() >= 0).all()


def test_relu_of_the_first_degree_is_kept_in_range_too(tmp_path: Path) -> None:
    def further(weights: Weights) -> None:
        for seed, prefix in enumerate(weights.each_layer()):
            weights.scale_squares(prefix, powers_of_two(SMALL["intermediate_size"], 14, 16, seed), degree=1)

    plain = write_checkpoint(tmp_path / "plain", hidden_act="relu")
    checkpoint = rescaled(plain, tmp_path / "far", further)
    scaling, layers = layers_of(checkpoint)
    safe = keep_in_range(layers[0], {}, scaling)
    assert (safe.range.before > LARGEST, safe.range.after <= LIMIT) == (True, True)
    own = Scaling(scaling.spec, {f"{LAYERS}0.{channels}": factor for channels, factor in safe.factors.items()})
    assert largest_given(checkpoint, own)[0] == pytest.approx(safe.range.after, rel=1e-3)


def test_an_activation_that_lets_no_factor_through_is_refused(tmp_path: Path) -> None:
    def further(weights: Weights) -> None:
        for prefix in weights.each_layer():
            weights.tensors[f"{prefix}mlp.up_proj.weight"] *= 2.0**16

    plain = write_checkpoint(tmp_path / "plain", hidden_act="gelu")
    scaling, layers = layers_of(rescaled(plain, tmp_path / "far", further))
    with pytest.raises(UserError) as refusal:
        keep_in_range(layers[0], {}, scaling)
    assert_tells(refusal.value, "layer 0", "mlp.", "65504", "export with --precision bf16")


def large_residual(weights: Weights) -> None:
    """A residual stream of 50 000, which norms make nothing of: fp16 holds it, another text's maybe not."""
    embedding = weights.tensors["model.embed_tokens.weight"]
    embedding *= 50_000 / embedding[3:].abs().max()


def test_a_residual_stream_near_the_end_of_fp16_is_refused(
    in_range: Path, tmp_path: Path, quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = rescaled(in_range, tmp_path / "residual", large_residual)
    with pytest.raises(UserError) as refusal:
        export(checkpoint, tmp_path / "bundle", OPTIONS)
    assert_tells(refusal.value, "layer 0", "residual stream", "65504", "export with --precision bf16")
    assert run(["export", str(checkpoint), str(tmp_path / "bundle"), "--precision", "fp16"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "residual stream" in line]
    assert len(told) == 1
    assert "layer 0" in told[0]
    assert "--precision bf16" in told[0]
    assert not (tmp_path / "bundle").exists()
    export(checkpoint, tmp_path / "bundle", replace(OPTIONS, precision="bf16"))  # as the message says


def test_a_residual_stream_of_half_the_range_is_not(in_range: Path, tmp_path: Path) -> None:
    def large(weights: Weights) -> None:
        weights.tensors["model.embed_tokens.weight"] *= (
            30_000 / weights.tensors["model.embed_tokens.weight"].abs().max()
        )

    scaling, layers = layers_of(rescaled(in_range, tmp_path / "residual", large))
    safe = keep_in_range(layers[0], {}, scaling)
    assert safe.factors == {}
    assert safe.range.where == "residual stream"
