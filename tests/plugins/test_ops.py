"""The fused op means the same in numpy, as its ONNX function, and as transformers computes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, NemotronConfig
from transformers.models.nemotron.modeling_nemotron import NemotronAttention, NemotronRotaryEmbedding

from plugins.onnxruntime import CannotLower, lower_to_group_query_attention
from plugins.ops import (
    BODY_OPSET,
    DOMAIN,
    PARTIAL_ROPE_ATTENTION,
    PARTIAL_ROPE_SELF_ATTENTION,
    partial_rope_attention_function,
    partial_rope_self_attention_function,
)
from plugins.reference import partial_rope_attention, partial_rope_self_attention
from plugins.standard import lower_to_masked_attention

INPUTS = ("query", "key", "value", "cos", "sin", "past_key", "past_value", "write_indices")
OUTPUTS = ("context", "present_key", "present_value")
POSITIONS = 64


def fused_model(shape: dict[str, int]) -> ir.Model:
    """A graph of one fused op."""
    heads, kv_heads, width = shape["heads"], shape["kv_heads"], shape["head_dim"]
    half = shape["rotary_dim"] // 2
    cache = ["batch", kv_heads, "capacity", width]
    shapes: list[list[int | str]] = [
        ["batch", "sequence", heads * width],
        *[["batch", "sequence", kv_heads * width]] * 2,
        *[[POSITIONS, half]] * 2,
        *[cache] * 2,
        ["batch"],
    ]
    values = [ir.val(name, dtype=ir.DataType.FLOAT, shape=dims) for name, dims in zip(INPUTS, shapes, strict=True)]
    values[-1].dtype = ir.DataType.INT64
    node = ir.node(
        PARTIAL_ROPE_ATTENTION, values, {**shape, "scale": width**-0.5}, domain=DOMAIN, num_outputs=len(OUTPUTS)
    )
    for output, name, dims in zip(node.outputs, OUTPUTS, [shapes[0], cache, cache], strict=True):
        output.name, output.dtype, output.shape = name, ir.DataType.FLOAT, ir.Shape(dims)
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": BODY_OPSET, DOMAIN: 1}, name="fused")
    return ir.Model(graph, ir_version=11, functions=[partial_rope_attention_function()])


def run(model: ir.Model, feeds: dict[str, Any]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(list(OUTPUTS), feeds)


def tables(rotary_dim: int) -> tuple[np.ndarray, np.ndarray]:
    angles = np.outer(np.arange(POSITIONS), 10000.0 ** -(np.arange(0, rotary_dim, 2) / rotary_dim))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Heads, widths, unequal rows; the last row may end at the last free position."""
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    rotary_dim, rest = draw(st.sampled_from([16, 32])), draw(st.sampled_from([0, 16, 32]))
    batch, sequence, spare = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(0, 6))
    shape = {"heads": kv_heads * group, "kv_heads": kv_heads, "head_dim": rotary_dim + rest, "rotary_dim": rotary_dim}
    capacity = sequence + spare
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    width = shape["head_dim"]
    dims = [shape["heads"] * width, kv_heads * width, kv_heads * width]
    arrays = [random.standard_normal((batch, sequence, dim), np.float32) for dim in dims]
    caches = [random.standard_normal((batch, kv_heads, capacity, width), np.float32) for _ in range(2)]
    starts = random.integers(0, spare + 1, size=batch)
    starts[-1] = spare
    values = [*arrays, *tables(rotary_dim), *caches, starts]
    return shape, dict(zip(INPUTS, values, strict=True))


@settings(max_examples=25, deadline=None)
@given(cases())
def test_function_body_gives_what_numpy_gives(case: tuple[dict[str, int], dict[str, np.ndarray]]) -> None:
    shape, feeds = case
    expected = partial_rope_attention(
        *feeds.values(), heads=shape["heads"], kv_heads=shape["kv_heads"], scale=shape["head_dim"] ** -0.5
    )
    for ours, theirs in zip(run(fused_model(shape), feeds), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "factor"), [(4, 2, 0.5), (4, 4, 1.0), (4, 1, 0.25)])
def test_numpy_meaning_is_transformers_attention(heads: int, kv_heads: int, factor: float) -> None:
    width, past, new = 64, 3, 4
    config = NemotronConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        partial_rotary_factor=factor,
        attn_implementation="eager",
    )
    module = NemotronAttention(config, layer_idx=0)
    for projection in (module.q_proj, module.o_proj):
        torch.nn.init.eye_(projection.weight)  # so that what goes in is the query, and what comes out the context
    torch.manual_seed(0)
    hidden, cache = torch.randn(1, new, heads * width), DynamicCache(config=config)
    past_key, past_value = torch.randn(2, 1, kv_heads, past, width)
    cache.update(past_key, past_value, 0)
    positions = torch.arange(past, past + new)[None]
    mask = torch.full((new, past + new), -torch.inf).triu(past + 1)[None, None]
    with torch.no_grad():
        context, _ = module(hidden, NemotronRotaryEmbedding(config)(hidden, positions), mask, cache)
        key, value = module.k_proj(hidden), module.v_proj(hidden)

    def room(x: torch.Tensor) -> np.ndarray:
        return np.pad(x.numpy(), [(0, 0), (0, 0), (0, new + 2), (0, 0)])

    ours, present_key, _ = partial_rope_attention(
        hidden.numpy(),
        key.numpy(),
        value.numpy(),
        *tables(int(width * factor)),
        room(past_key),
        room(past_value),
        np.array([past]),
        heads=heads,
        kv_heads=kv_heads,
        scale=width**-0.5,
    )
    np.testing.assert_allclose(ours, context.numpy(), atol=2e-6)
    np.testing.assert_allclose(present_key[:, :, : past + new], cache.layers[0].keys.numpy(), atol=2e-6)


def test_numpy_meaning_refuses_a_write_past_the_capacity() -> None:
    cache = np.zeros((1, 1, 4, 16), np.float32)
    token = np.zeros((1, 2, 16), np.float32)
    with pytest.raises(ValueError, match="position 4 is past the capacity 4"):
        partial_rope_attention(
            token, token, token, *tables(16), cache, cache, np.array([3]), heads=1, kv_heads=1, scale=1.0
        )


SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 48, "rotary_dim": 32}


@pytest.mark.parametrize(
    ("starts", "sequence"),
    [([0, 0], 5), ([3, 6], 1), ([2], 4)],
    ids=["prefill", "ragged decode", "chunk of one row"],
)
def test_group_query_attention_gives_what_the_fused_op_means(starts: list[int], sequence: int) -> None:
    random, batch, capacity = np.random.default_rng(0), len(starts), 8
    width = SHAPE["head_dim"]
    dims = [SHAPE["heads"] * width, SHAPE["kv_heads"] * width, SHAPE["kv_heads"] * width]
    arrays = [random.standard_normal((batch, sequence, dim), np.float32) for dim in dims]
    caches = [random.standard_normal((batch, SHAPE["kv_heads"], capacity, width), np.float32) for _ in range(2)]
    values = [*arrays, *tables(SHAPE["rotary_dim"]), *caches, np.array(starts)]
    expected = partial_rope_attention(*values, heads=4, kv_heads=2, scale=width**-0.5)

    model = fused_model(SHAPE)
    last_key = ir.val("last_key", dtype=ir.DataType.INT32, shape=["batch"])
    total = ir.val("total", dtype=ir.DataType.INT32, shape=[])
    model.graph.inputs.extend([last_key, total])
    assert lower_to_group_query_attention(model.graph, last_key, total, positions_are_not_needed) == []
    model.functions.clear()
    model.graph.opset_imports.update({"": 21, "com.microsoft": 1})
    model.graph.inputs.pop(INPUTS.index("write_indices"))
    last = np.array(starts, np.int32) + sequence - 1
    feeds = dict(zip(INPUTS[:-1], values[:-1], strict=True)) | {"last_key": last, "total": np.array(last.max() + 1)}
    # Positions that no row has reached are the cache's old content in one and arbitrary in the other.
    context, present_key, present_value = run(model, feeds)
    np.testing.assert_allclose(context, expected[0], atol=2e-6)
    for row, start in enumerate(starts):
        for ours, theirs in ((present_key, expected[1]), (present_value, expected[2])):
            np.testing.assert_allclose(ours[row, :, : start + sequence], theirs[row, :, : start + sequence], atol=2e-6)


def positions_are_not_needed() -> ir.Value:
    raise AssertionError("rotation is inside the attention")


def test_a_rotary_width_that_the_attention_would_misread_is_rotated_ahead_of_it() -> None:
    model = fused_model({**SHAPE, "rotary_dim": 24})
    told = lower_to_group_query_attention(model.graph, ir.val("last_key"), ir.val("total"), lambda: ir.val("positions"))
    assert len(told) == 1
    assert "rotary_dim 24" in told[0]
    operators = [node.op_type for node in model.graph]
    assert operators == ["RotaryEmbedding", "RotaryEmbedding", "GroupQueryAttention"]
    assert "do_rotary" not in next(node for node in model.graph if node.op_type == "GroupQueryAttention").attributes


def test_a_head_width_that_onnxruntime_refuses_is_refused_with_the_limit() -> None:
    model = fused_model({**SHAPE, "head_dim": 44})
    with pytest.raises(CannotLower, match="44 is not a multiple of 8"):
        lower_to_group_query_attention(model.graph, ir.val("last_key"), ir.val("total"), positions_are_not_needed)


def self_attention_model(shape: dict[str, int]) -> ir.Model:
    """A graph of one fused op of whole rows."""
    heads, kv_heads, width = shape["heads"], shape["kv_heads"], shape["head_dim"]
    tokens = ["batch", "sequence"]
    shapes: dict[str, list[int | str]] = {
        "query": [*tokens, heads * width],
        "key": [*tokens, kv_heads * width],
        "value": [*tokens, kv_heads * width],
        "cos": [POSITIONS, shape["rotary_dim"] // 2],
        "sin": [POSITIONS, shape["rotary_dim"] // 2],
        "position_ids": [*tokens],
        "attention_mask": [*tokens],
    }
    values = [ir.val(name, dtype=ir.DataType.FLOAT, shape=dims) for name, dims in shapes.items()]
    for value in values[-2:]:
        value.dtype = ir.DataType.INT64
    node = ir.node(PARTIAL_ROPE_SELF_ATTENTION, values, {**shape, "scale": width**-0.5}, domain=DOMAIN, num_outputs=2)
    for output, name, dims in zip(
        node.outputs, ("context", "weights"), (shapes["query"], ["batch", heads, "sequence", "sequence"]), strict=True
    ):
        output.name, output.dtype, output.shape = name, ir.DataType.FLOAT, ir.Shape(dims)
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": BODY_OPSET, DOMAIN: 1}, name="fused")
    return ir.Model(graph, ir_version=11, functions=[partial_rope_self_attention_function()])


@pytest.mark.parametrize("lowered", [False, True], ids=["function body", "standard operators"])
def test_whole_rows_give_what_numpy_gives_with_padding_on_either_side(lowered: bool) -> None:
    random, width = np.random.default_rng(0), SHAPE["head_dim"]
    dims = [SHAPE["heads"] * width, SHAPE["kv_heads"] * width, SHAPE["kv_heads"] * width]
    arrays = [random.standard_normal((3, 6, dim), np.float32) for dim in dims]
    positions = random.integers(0, POSITIONS, size=(3, 6))
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 1]])
    values = [*arrays, *tables(SHAPE["rotary_dim"]), positions, mask]
    expected = partial_rope_self_attention(*values, heads=4, kv_heads=2, scale=width**-0.5)
    model = self_attention_model(SHAPE)
    if lowered:
        assert lower_to_masked_attention(model.graph, model.graph.inputs[-1]) == 1
        model.functions.clear()
    names = [value.name for value in model.graph.inputs]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    found = session.run(["context", "weights"], dict(zip(names, values, strict=True)))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours, theirs, atol=2e-6)
