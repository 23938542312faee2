"""Every field of the configuration, and every form of graph: what the matrix of exports runs over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ABSENT = object()  # a key that config.json does not have

PAIRS = 8  # pairs of channels that rotate in SMALL: half of 32 channels

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16, "attention_factor": 1.2},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "longrope": {
        "factor": 2.0,
        "short_factor": [1.0 + pair / 8 for pair in range(PAIRS)],
        "long_factor": [2.0 + pair for pair in range(PAIRS)],
        "original_max_position_embeddings": 32,
    },
    "proportional": {"factor": 2.0},
}


@dataclass(frozen=True)
class Case:
    """A configuration over SMALL.

    Attributes:
        config: what config.json says.
        max_length: what is asked of the export; None for its default.
        apart: whether GroupQueryAttention cannot rotate it.
        core: whether it is run by the fast tests.
    """

    config: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    apart: bool = False
    core: bool = False


def _ropes() -> dict[str, Case]:
    cases = {}
    for name, parameters in ROPES.items():
        length = 32 if name == "longrope" else None
        old = {"rope_theta": 500.0, "partial_rotary_factor": 0.5, "rope_scaling": {"type": name, **parameters}}
        new = {
            "rope_parameters": {
                "rope_type": name,
                "rope_theta": 500.0,
                "partial_rotary_factor": 0.5,
                **parameters,
            }
        }
        cases[f"rope {name}, as transformers 4 writes it"] = Case(old, length)
        cases[f"rope {name}, as transformers 5 writes it"] = Case(new, length, core=name == "yarn")
    return cases


CONFIGURATIONS: dict[str, Case] = {
    "key/value heads absent": Case({"num_key_value_heads": ABSENT}),
    "a key/value head per query head": Case({"num_key_value_heads": 4}),
    "one key/value head": Case({"num_key_value_heads": 1}),
    "a group of three": Case({"num_attention_heads": 6, "num_key_value_heads": 2}),
    "head_dim absent": Case({"head_dim": ABSENT, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "heads wider than the hidden state": Case({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64}),
    "heads narrower than the hidden state": Case({"hidden_size": 96, "num_attention_heads": 2, "head_dim": 32}),
    "a quarter rotates": Case({"partial_rotary_factor": 0.25, "head_dim": 64}),
    "three quarters rotate": Case({"partial_rotary_factor": 0.75, "head_dim": 64}),
    "every channel rotates": Case({"partial_rotary_factor": 1.0}),
    "8 of 32 channels rotate": Case({"partial_rotary_factor": 0.25}, apart=True, core=True),
    "12 of 24 channels rotate": Case({"head_dim": 24}, apart=True),
    "all of 24 channels rotate": Case({"head_dim": 24, "partial_rotary_factor": 1.0}, apart=True),
    "an odd number of channels, rounded up": Case({"partial_rotary_factor": 0.4, "head_dim": 32}, apart=True),
    **_ropes(),
    "biases of the attention": Case({"attention_bias": True}),
    "biases of the MLP": Case({"mlp_bias": True}),
    "both biases, tied": Case({"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, core=True),
    "tied": Case({"tie_word_embeddings": True}),
    "a large epsilon": Case({"norm_eps": 0.1}),
    "a small epsilon": Case({"norm_eps": 1e-12}),
    "eos a list, pad absent": Case({"eos_token_id": [2, 5], "pad_token_id": ABSENT}),
    "eos absent": Case({"eos_token_id": None}),
    "a pad token": Case({"pad_token_id": 3}),
    "a vocabulary of 1031": Case({"vocab_size": 1031}),
    "an odd width of the MLP": Case({"intermediate_size": 101}),
    "what only training reads": Case(
        {"use_cache": False, "attention_dropout": 0.1, "initializer_range": 0.5, "bos_token_id": ABSENT}
    ),
    "one layer": Case({"num_hidden_layers": 1}),
    "five layers": Case({"num_hidden_layers": 5}),
    "a context of 7": Case({"max_position_embeddings": 7}),
    "longer than the model, which scales": Case(
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, max_length=100
    ),
    "longer than the model, from an original length": Case(
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}}, max_length=128
    ),
}
