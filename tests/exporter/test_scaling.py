"""Factors in a model's weights: transformers' model must give the same logits, or an export is of another model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL
from transformers import NemotronConfig, NemotronForCausalLM

from exporter.scaling import SCALING, Scaling, per_query_head
from exporter.spec import NemotronSpec, spec_from_config

TOKENS = torch.arange(3, 43).reshape(2, 20)
ACTIVATIONS, BIASES = ("relu2", "relu"), (False, True)


def model_of(**config: Any) -> NemotronForCausalLM:
    """A model in fp64 of fp32 weights, so that what differs is the weights' doing."""
    torch.manual_seed(0)
    model = NemotronForCausalLM(NemotronConfig(**{**SMALL, **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if "norm" in name or "bias" in name else parameter.shape[-1] ** -0.5)
    return model.double()


def spec_of(**config: Any) -> NemotronSpec:
    return spec_from_config({"model_type": "nemotron", **SMALL, **config}, "test")


def powers_of_two(size: int) -> torch.Tensor:
    """Of four, whose square roots are powers of two."""
    return 4.0 ** torch.randint(-3, 4, (size,))


def any_factors(size: int) -> torch.Tensor:
    return torch.exp(2 * torch.randn(size))


def random_scaling(spec: NemotronSpec, draw: Callable[[int], torch.Tensor]) -> Scaling:
    """Factors of every channel that can have one."""
    torch.manual_seed(1)
    factors = {"lm_head": draw(spec.hidden)}
    for layer in range(spec.layers):
        prefix = f"model.layers.{layer}."
        factors[f"{prefix}self_attn.q_proj"] = draw(spec.hidden)
        factors[f"{prefix}self_attn.o_proj"] = draw(spec.kv_heads * spec.head_dim)
        factors[f"{prefix}mlp.up_proj"] = draw(spec.hidden)
        factors[f"{prefix}mlp.down_proj"] = draw(spec.intermediate)
    return Scaling(spec, factors)


def rewritten(model: NemotronForCausalLM, change: Callable[[str, torch.Tensor], torch.Tensor]) -> NemotronForCausalLM:
    """The model with each parameter changed; LayerNorm1P keeps its weights less one."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            one = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(change(name, (parameter + one).float()).double() - one)
    return model


def logits(model: NemotronForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


def unchanged(_: str, weight: torch.Tensor) -> torch.Tensor:
    return weight


@pytest.mark.parametrize(
    ("activation", "attention_bias", "mlp_bias"),
    list(itertools.product(ACTIVATIONS, BIASES, BIASES)),
)
def test_the_model_computes_the_same_with_factors_in_its_weights(
    activation: str, attention_bias: bool, mlp_bias: bool
) -> None:
    config = {"hidden_act": activation, "attention_bias": attention_bias, "mlp_bias": mlp_bias}
    model, spec = rewritten(model_of(**config), unchanged), spec_of(**config)
    expected = logits(model)
    scaled = rewritten(model, random_scaling(spec, powers_of_two).apply)
    changed = {name for name, parameter in scaled.named_parameters() if not torch.equal(parameter, _named(model, name))}
    assert changed == {name for name, _ in model.named_parameters()} - _without_factors(spec)
    assert torch.equal(logits(scaled), expected)
    found = logits(rewritten(model, random_scaling(spec, any_factors).apply))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def _named(model: NemotronForCausalLM, name: str) -> torch.Tensor:
    return dict(model.named_parameters())[name]


def _without_factors(spec: NemotronSpec) -> set[str]:
    """What neither reads nor makes a channel that has factors: rows alone are read by rotations and the residual."""
    inner = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.o_proj.bias", "mlp.down_proj.bias")
    of_layers = {f"model.layers.{layer}.{name}" for layer in range(spec.layers) for name in inner}
    return {"model.embed_tokens.weight", *of_layers}


@pytest.mark.parametrize("heads", [(4, 1), (4, 4), (6, 3)])
def test_a_value_channel_has_one_factor_for_all_query_heads_that_read_it(heads: tuple[int, int]) -> None:
    config = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "attention_bias": True}
    model, spec = rewritten(model_of(**config), unchanged), spec_of(**config)
    scaling = random_scaling(spec, powers_of_two)
    assert torch.equal(logits(rewritten(model, scaling.apply)), logits(model))
    context = scaling.factors["model.layers.0.self_attn.o_proj"]
    repeated = context.reshape(heads[1], 32).repeat_interleave(heads[0] // heads[1], 0).flatten()
    assert torch.equal(per_query_head(context, spec), repeated)  # transformers' repeat_kv


def test_what_reads_a_cache_is_told_by_how_much_its_values_are_smaller() -> None:
    model, spec = rewritten(model_of(), unchanged), spec_of()
    scaling = random_scaling(spec, powers_of_two)
    scaled = rewritten(model, scaling.apply)
    with torch.no_grad():
        before, after = (m(TOKENS, use_cache=True).past_key_values.layers for m in (model, scaled))
    for layer, (own, given) in enumerate(zip(before, after, strict=True)):
        factor = scaling.of_values(layer)
        assert factor is not None
        assert torch.equal(given.values * factor, own.values)
        assert torch.equal(given.keys, own.keys)
    assert Scaling(spec).of_values(0) is None


@pytest.mark.parametrize("activation", ["relu2", "relu"])
def test_undo_gives_back_every_parameter(activation: str) -> None:
    config = {"hidden_act": activation, "attention_bias": True, "mlp_bias": True}
    spec, model = spec_of(**config), model_of(**config)
    exact, rounded = random_scaling(spec, powers_of_two), random_scaling(spec, any_factors)
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float()
        assert torch.equal(exact.undo(name, exact.apply(name, weight)), weight)
        torch.testing.assert_close(rounded.undo(name, rounded.apply(name, weight)), weight, rtol=1e-6, atol=0)


def test_a_parameter_without_factors_is_handed_on_in_its_own_dtype() -> None:
    spec = spec_of()
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        assert Scaling(spec).apply(name, weight) is weight
        assert Scaling(spec).undo(name, weight) is weight
    of_one_layer = Scaling(spec, {"model.layers.1.mlp.up_proj": torch.full((64,), 2.0)})
    assert of_one_layer.apply("model.layers.0.mlp.up_proj.weight", weight) is weight
    assert of_one_layer.of_columns("model.layers.0.mlp.up_proj.weight") is None
    assert of_one_layer.of_columns("model.layers.1.mlp.up_proj.weight") is not None


@pytest.mark.parametrize(("activation", "degree"), [("relu2", 2), ("relu", 1), ("gelu", None), ("silu", None)])
def test_only_activations_that_are_homogeneous_let_a_factor_through(activation: str, degree: int | None) -> None:
    from transformers.activations import ACT2FN

    assert Scaling(spec_of(hidden_act=activation)).degree == degree
    x, apply = torch.randn(1000, dtype=torch.float64), ACT2FN[activation]
    through = [torch.allclose(apply(3 * x), 3**power * apply(x)) for power in (1, 2)]
    assert through == [degree == 1, degree == 2]


def test_a_bundle_keeps_its_factors(tmp_path: Path) -> None:
    spec = spec_of()
    scaling = random_scaling(spec, any_factors)
    assert Scaling.load(tmp_path, spec).factors == {}
    scaling.save(tmp_path)
    assert (tmp_path / SCALING).is_file()
    found = Scaling.load(tmp_path, spec)
    assert found.factors.keys() == scaling.factors.keys()
    assert all(torch.equal(found.factors[name], factor) for name, factor in scaling.factors.items())
