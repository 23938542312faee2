"""The trace is transformers' own model with an explicit cache, and takes no weight into memory."""

from __future__ import annotations

import logging
import resource
import warnings
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from checkpoints import SMALL
from transformers import NemotronConfig, NemotronForCausalLM

from exporter.rope import rope_tables
from exporter.spec import spec_from_config
from exporter.trace import meta_module, trace

# One layer as wide as Nemotron-4-340B's: 17 GB of weights in fp32.
HUGE: dict[str, Any] = {
    "hidden_size": 18432,
    "intermediate_size": 2048,
    "num_hidden_layers": 1,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 192,
    "vocab_size": 90_000,
}


def spec_of(**values: Any) -> Any:
    return spec_from_config({"model_type": "nemotron", **SMALL, **values}, "test")


@pytest.fixture(scope="module")
def huge() -> tuple[ir.Model, int, list[Any], tuple[int, int]]:
    """The trace, bytes the process grew by, warnings, and a logger's level before and after."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    levels = [logger.level]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = trace(spec_of(**HUGE))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return model, grown, caught, (levels[0], logger.level)


def parameters(**values: Any) -> dict[str, tuple[int, ...]]:
    """transformers' own names and shapes, of a module that was never traced."""
    with torch.device("meta"):
        module = NemotronForCausalLM(NemotronConfig(**{**SMALL, **values}))
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_a_model_larger_than_memory_can_be_traced(huge) -> None:
    shapes = parameters(**HUGE)
    weights = 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    assert weights > 16e9
    assert huge[1] < 2e9


def test_no_initializer_of_the_trace_holds_a_weight(huge) -> None:
    model = huge[0]
    without = {name: tuple(v.shape) for name, v in model.graph.initializers.items() if v.const_value is None}
    assert without == parameters(**HUGE)  # by the checkpoint's names
    held = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    assert sum(tensor.nbytes for tensor in held) < 10_000


def test_tracing_is_quiet_and_leaves_logging_as_it_was(huge) -> None:
    _, _, caught, (before, after) = huge
    assert not caught
    assert before == after


def test_the_traced_layer_takes_and_gives_its_cache_by_name(traced) -> None:
    _, model = traced()
    past = [f"past_key_values.0.{kind}" for kind in ("key", "value")]
    present = [f"present.0.{kind}" for kind in ("key", "value")]
    assert [value.name for value in model.graph.inputs] == ["input_ids", "attention_mask", *past]
    assert [value.name for value in model.graph.outputs] == ["logits", *present]
    assert model.opset_imports[""] == 23
    for value in model.graph.inputs[2:]:
        batch, heads, length, width = value.shape
        assert (heads, width) == (SMALL["num_key_value_heads"], SMALL["head_dim"])
        assert not isinstance(batch, int)
        assert not isinstance(length, int)
    assert not any(isinstance(dim, int) for dim in model.graph.inputs[0].shape)


def test_the_weights_of_the_trace_are_named_as_in_the_checkpoint(traced) -> None:
    _, model = traced()
    weights = {name: tuple(v.shape) for name, v in model.graph.initializers.items() if v.const_value is None}
    assert weights == parameters(num_hidden_layers=1)


def test_buffers_that_no_checkpoint_holds_keep_their_values(traced) -> None:
    _, model = traced()
    frequencies = model.graph.initializers["model.rotary_emb.inv_freq"].const_value
    expected = 1e4 ** -(np.arange(0, 16, 2) / 16)  # half of 32 channels rotate
    np.testing.assert_allclose(frequencies.numpy(), expected, rtol=1e-6)


def test_the_module_takes_no_memory_and_leaves_the_spec_as_it_was() -> None:
    spec = spec_of()
    before = spec.config.to_dict()
    module = meta_module(spec)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not module.training
    assert module.model.config._attn_implementation == "sdpa"
    assert spec.config.to_dict() == before
    assert spec.config._attn_implementation != "sdpa"


def angles(width: int, head: int, theta: float = 1e4) -> np.ndarray:
    """By the paper's formula, RoFormer (Su et al. 2021): theta^(-2i/head) for `width` of `head` channels."""
    return np.asarray(theta ** -(np.arange(0, width, 2) / head))


@pytest.mark.parametrize(
    ("rope", "frequencies"),
    [
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, angles(16, 16)),
        ({"rope_type": "default", "partial_rotary_factor": 1.0}, angles(32, 32)),
        ({"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 5e5}, angles(16, 16, 5e5)),
        ({"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5}, angles(16, 16) / 4),
        ({"rope_type": "proportional", "partial_rotary_factor": 0.5}, np.r_[angles(16, 32), np.zeros(8)]),
    ],
    ids=["half", "all", "theta", "linear", "proportional"],
)
@pytest.mark.parametrize("length", [1, 64])
def test_the_rotary_tables_are_those_of_the_formula(rope: dict[str, Any], frequencies: np.ndarray, length: int) -> None:
    cos, sin = rope_tables(spec_of(rope_parameters={"rope_theta": 1e4, **rope}), length)
    expected = np.outer(np.arange(length), frequencies)
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_allclose(cos, np.cos(expected), atol=1e-5)
    np.testing.assert_allclose(sin, np.sin(expected), atol=1e-5)


def test_tables_of_yarn_carry_its_attention_factor() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "partial_rotary_factor": 0.5}
    cos, _ = rope_tables(spec_of(rope_parameters={"rope_theta": 1e4, **rope}), 8)
    np.testing.assert_allclose(cos[0], 0.1 * np.log(4) + 1, rtol=1e-6)  # YaRN, Peng et al. 2023, equation 22
