"""The configuration is understood as transformers understands it, and what cannot be exported is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import SMALL
from refusals import assert_tells
from transformers import AutoConfig, NemotronForCausalLM
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding

from exporter.rope import ROPE_TYPES
from exporter.spec import LEARNED_ACTIVATIONS, NemotronSpec, read_spec, spec_from_config
from runtime.errors import UserError

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "proportional": {},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
    "dynamic": {"factor": 2.0},
}


def frequency_factors(factor: float) -> dict[str, Any]:
    """What longrope needs for a head of 32 channels of which this part rotates."""
    pairs = int(32 * factor) // 2
    return {
        "short_factor": [1.0 + pair / 8 for pair in range(pairs)],
        "long_factor": [2.0] * pairs,
        "original_max_position_embeddings": 32,
        "factor": 2.0,
    }


def spec_of(drop: tuple[str, ...] = (), **values: Any) -> NemotronSpec:
    raw = {"model_type": "nemotron", "architectures": ["NemotronForCausalLM"], **SMALL, **values}
    return spec_from_config({name: value for name, value in raw.items() if name not in drop}, "c/config.json")


def refusal(**values: Any) -> UserError:
    with pytest.raises(UserError) as refused:
        spec_of(**values)
    return refused.value


def test_the_trained_checkpoint_is_read_as_its_file_says(tiny_checkpoint: Path) -> None:
    raw = json.loads((tiny_checkpoint / "config.json").read_text())
    spec = read_spec(tiny_checkpoint)
    assert (spec.layers, spec.hidden, spec.intermediate) == (4, 256, 1024)
    assert (spec.heads, spec.kv_heads, spec.head_dim, spec.rotary_dim) == (4, 2, 64, 32)
    assert (spec.vocab, spec.max_positions, spec.norm_eps) == (2048, 512, raw["norm_eps"])
    assert (spec.activation, spec.rope_type, spec.tied) == ("relu2", "default", False)
    assert spec.architecture == "NemotronForCausalLM"


def test_scores_are_scaled_as_transformers_scales_them() -> None:
    with torch.device("meta"):
        model = NemotronForCausalLM(spec_of(head_dim=80).config)
    assert spec_of(head_dim=80).scale == pytest.approx(model.model.layers[0].self_attn.head_dim ** -0.5)


def test_old_files_that_do_not_say_how_many_heads_or_how_wide_are_understood() -> None:
    assert spec_of(drop=("num_key_value_heads",)).kv_heads == SMALL["num_attention_heads"]
    assert spec_of(num_key_value_heads=None).kv_heads == SMALL["num_attention_heads"]
    assert spec_of(drop=("head_dim",)).head_dim == SMALL["hidden_size"] // SMALL["num_attention_heads"]
    assert spec_of(drop=("architectures",)).architecture == "NemotronForCausalLM"


def test_the_rotary_factor_is_found_where_old_and_new_files_keep_it() -> None:
    new = spec_of(rope_parameters={"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.25})
    old = spec_of(rope_theta=5e3, partial_rotary_factor=0.25, rope_scaling=None)
    assert new.rotary_dim == old.rotary_dim == 8
    assert old.config.rope_parameters["rope_theta"] == 5e3
    assert spec_of(drop=("rope_parameters",)).rotary_dim == 16  # a Nemotron rotates half where nothing is said


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
def test_as_many_channels_rotate_as_transformers_gives_angles_to(rope_type: str, factor: float) -> None:
    own = frequency_factors(factor) if rope_type == "longrope" else ROPES[rope_type]
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "partial_rotary_factor": factor, **own}
    spec = spec_of(rope_parameters=rope)
    cos, _ = NemotronRotaryEmbedding(spec.config)(torch.zeros(1), torch.arange(3)[None])
    assert (spec.rope_type, spec.rotary_dim) == (rope_type, cos.shape[-1])


def test_an_odd_number_of_rotating_channels_is_rounded_up_to_pairs() -> None:
    spec = spec_of(partial_rotary_factor=0.47)  # 15.04 of 32
    cos, _ = NemotronRotaryEmbedding(spec.config)(torch.zeros(1), torch.arange(3)[None])
    assert spec.rotary_dim == cos.shape[-1] == 16


def test_every_rope_type_of_transformers_is_known() -> None:
    assert {"default", *ROPE_INIT_FUNCTIONS} == set(ROPE_TYPES)


@pytest.mark.parametrize(
    "values",
    [
        {"rope_scaling": {"type": "axial", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "bogus"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "axial", "factor": 2.0}},
        {"rope_parameters": {"rope_type": ["default"]}},
    ],
    ids=["older name", "unknown", "older name wins", "list"],
)
def test_an_unknown_rope_type_is_refused_with_the_known_ones(values: dict[str, Any]) -> None:
    assert_tells(refusal(**values), "c/config.json", "rope type", *ROPE_TYPES)


@pytest.mark.parametrize("activation", ["swiglu", None, ["relu2"], *LEARNED_ACTIVATIONS])
def test_an_unknown_activation_is_refused_with_the_known_ones(activation: object) -> None:
    assert_tells(
        refusal(hidden_act=activation), "c/config.json", "hidden_act", repr(activation), "relu2", "gelu", "silu"
    )


@pytest.mark.parametrize("activation", sorted(set(ACT2FN) - set(LEARNED_ACTIVATIONS)))
def test_every_activation_that_is_offered_has_no_tensors_of_its_own(activation: str) -> None:
    assert spec_of(hidden_act=activation).activation == activation
    assert not list(ACT2FN[activation].parameters())
    assert not list(ACT2FN[activation].buffers())


@pytest.mark.parametrize("model_type", ["llama", "nemotron_h", None])
def test_another_architecture_is_refused_by_its_name(model_type: str | None) -> None:
    assert_tells(refusal(model_type=model_type), "c/config.json", repr(model_type), "'nemotron'")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 0),
        ("hidden_size", 0),
        ("intermediate_size", -1),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 3),
        ("head_dim", 0),
        ("vocab_size", 0),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", -4),
        ("num_hidden_layers", "2"),
        ("num_hidden_layers", 2.0),
        ("norm_eps", -1e-5),
        ("norm_eps", float("nan")),
        ("eos_token_id", "</s>"),
        ("architectures", "NemotronForCausalLM"),
        ("architectures", {"a": 1}),
        ("dtype", "bogus"),
    ],
)
def test_a_value_that_no_model_can_have_is_refused_before_torch_fails_on_it(name: str, value: object) -> None:
    what = f"{value} key/value heads" if value == 3 else "bogus" if name == "dtype" else name
    assert_tells(refusal(**{name: value}), "c/config.json", what)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"partial_rotary_factor": "0.5"}, "partial_rotary_factor"),
        ({"partial_rotary_factor": -0.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.001}, "partial_rotary_factor"),
        ({"rope_theta": "ten thousand"}, "rope_theta"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": [1]}, "rope_parameters"),
    ],
)
def test_a_rotation_that_cannot_be_is_refused(values: dict[str, Any], named: str) -> None:
    assert_tells(refusal(**values), "c/config.json", named)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[]", b"null", b'{"model_type": "nemotron"'])
def test_a_damaged_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_spec(tmp_path)
    assert_tells(refused.value, tmp_path / "config.json", "download the checkpoint again")


def test_a_directory_without_a_configuration_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_spec(tmp_path)
    assert_tells(refused.value, tmp_path / "config.json", "not a Hugging Face checkpoint")


def test_the_configuration_behind_the_spec_is_the_one_transformers_reads(tiny_checkpoint: Path) -> None:
    theirs = AutoConfig.from_pretrained(tiny_checkpoint).to_dict()
    ours = read_spec(tiny_checkpoint).config.to_dict()
    for unimportant in ("_name_or_path", "transformers_version"):
        theirs.pop(unimportant, None)
        ours.pop(unimportant, None)
    assert ours == theirs
