"""How many positions a rope type's one table holds, and what is refused beyond it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SMALL
from matrix import PAIRS, ROPES
from refusals import assert_tells
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding

from exporter.rope import checked_length, longest, rope_tables
from exporter.spec import NemotronSpec, spec_from_config
from runtime.errors import UserError


def spec_of(rope: str, **parameters: Any) -> NemotronSpec:
    values = {"rope_type": rope, "rope_theta": 1e4, "partial_rotary_factor": 0.5, **ROPES[rope], **parameters}
    return spec_from_config({"model_type": "nemotron", **SMALL, "rope_parameters": values}, "c/config.json")


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ("default", 64),
        ("dynamic", 64),
        ("linear", 128),
        ("proportional", 128),
        ("yarn", 64),
        ("llama3", 256),
        ("longrope", 32),
    ],
)
def test_a_row_is_as_long_as_the_type_scales(rope: str, expected: int) -> None:
    spec = spec_of(rope)
    assert longest(spec) == checked_length(spec, expected) == expected
    with pytest.raises(UserError) as refused:
        checked_length(spec, expected + 1)
    assert_tells(refused.value, "--max-length", expected)


def test_a_table_that_would_change_with_the_length_is_refused_by_default_with_the_reason() -> None:
    with pytest.raises(UserError) as refused:
        checked_length(spec_of("longrope"), None)
    assert_tells(refused.value, "longrope", "cache", "--max-length 32")


@pytest.mark.parametrize("rope", ROPES)
def test_within_its_length_the_table_is_what_transformers_computes_at_any_step(rope: str) -> None:
    """dynamic and longrope compute anew for each length: no length that is exported may give another table."""
    spec = spec_of(rope)
    cos, sin = rope_tables(spec, longest(spec))
    module = NemotronRotaryEmbedding(spec.config)
    for length in (1, 2, longest(spec) // 2, longest(spec)):
        theirs = [table[0, :, :PAIRS] for table in module(torch.zeros(1), torch.arange(length)[None])]
        if rope != "proportional":
            np.testing.assert_array_equal(cos[:length], theirs[0])
            np.testing.assert_array_equal(sin[:length], theirs[1])


@pytest.mark.parametrize("parameters", [{"short_factor": [1.0] * (PAIRS + 1)}, {"short_factor": "wide"}])
def test_factors_that_do_not_fit_the_width_are_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(UserError) as refused:
        spec_of("longrope", **parameters)
    assert_tells(refused.value, "c/config.json")
