"""Attention by blocks of keys, merged, is the fused op's attention: in numpy, and on runtimes that know neither op."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from split_cases import Case

from plugins.ops import BODY_OPSET, DOMAIN
from plugins.reference import partial_rope_attention, rotate
from plugins.split_attention import (
    GRANULE,
    MERGE_ATTENTION,
    MOST_BLOCKS,
    SPLIT_ATTENTION,
    blocks_of,
    keys_each,
    merge_attention_function,
    partial_shapes,
    split_attention_function,
)
from plugins.split_reference import Partials, merge_attention, split_attention

PARTIALS = ("maxima", "sums", "contexts")


def model_of(case: Case, dtype: ir.DataType = ir.DataType.FLOAT) -> onnx.ModelProto:
    """A graph of both ops, with the partials among its outputs."""
    cache = ["batch", case.kv_heads, "capacity", case.head_dim]
    query = ["batch", "sequence", case.heads * case.head_dim]
    table = ["positions", case.rotary_dim // 2]
    shapes = {"query": query, "cos": table, "sin": table, "key_cache": cache, "value_cache": cache}
    inputs = [ir.val(name, dtype=dtype, shape=dims) for name, dims in shapes.items()]
    lengths = ir.val("lengths", dtype=ir.DataType.INT32, shape=["batch"])
    attributes = {name: getattr(case, name) for name in ("heads", "kv_heads", "head_dim", "rotary_dim", "scale")}
    split = ir.node(SPLIT_ATTENTION, [*inputs, lengths], attributes, domain=DOMAIN, num_outputs=3)
    merge = ir.node(MERGE_ATTENTION, [*split.outputs, lengths], {"to": int(dtype)}, domain=DOMAIN)
    blocks = ["batch", case.heads, "sequence", "blocks"]
    for output, name, dims in zip(split.outputs, PARTIALS, (blocks, blocks, [*blocks, case.head_dim]), strict=True):
        output.name, output.dtype, output.shape = name, ir.DataType.FLOAT, ir.Shape(dims)
    context = merge.outputs[0]
    context.name, context.dtype, context.shape = "context", dtype, ir.Shape(query)
    graph = ir.Graph(
        [*inputs, lengths],
        [*split.outputs, context],
        nodes=[split, merge],
        opset_imports={"": BODY_OPSET, DOMAIN: 1},
        name="split",
    )
    functions = [split_attention_function(), merge_attention_function()]
    return ir.to_proto(ir.Model(graph, ir_version=11, functions=functions))


def feeds(case: Case, dtype: type[np.floating] = np.float32) -> dict[str, np.ndarray]:
    return dict(zip(("query", "cos", "sin", "key_cache", "value_cache", "lengths"), case.inputs(dtype), strict=True))


def run(model: onnx.ModelProto, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run([*PARTIALS, "context"], given)


def meant(case: Case) -> tuple[Partials, np.ndarray]:
    inputs = case.inputs()
    partials = split_attention(*inputs, heads=case.heads, kv_heads=case.kv_heads, scale=case.scale)
    return partials, merge_attention(*partials, inputs[-1])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Heads, widths, unequal rows, blocks of one and of several granules; a row may be as long as the capacity."""
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rotary_dim, rest = draw(st.sampled_from([8, 16])), draw(st.sampled_from([0, 16]))
    sequence = draw(st.sampled_from([1, 2, 5, 31, 65]))
    capacity = sequence + draw(st.integers(0, 400))
    lengths = draw(st.lists(st.integers(sequence, capacity), min_size=1, max_size=3))
    heads = kv_heads * group
    seed = draw(st.integers(0, 2**32 - 1))
    return Case(heads, kv_heads, rotary_dim + rest, rotary_dim, tuple(lengths), sequence, capacity, seed)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_numpy_meaning_is_a_softmax_over_the_keys_that_a_query_sees(case: Case) -> None:
    np.testing.assert_allclose(meant(case)[1], case.expected(), atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_function_bodies_give_what_numpy_gives(case: Case) -> None:
    partials, context = meant(case)
    *found, merged = run(model_of(case), feeds(case))
    for ours, theirs in zip(found, partials, strict=True):
        defined = ~np.isnan(theirs)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours[defined], theirs[defined], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(merged, context, atol=1e-5)


def test_function_bodies_keep_a_cache_and_a_context_of_16_bit() -> None:
    case = Case(4, 2, 64, 32, lengths=(70, 200), sequence=3, capacity=200)
    *_, context = run(model_of(case, ir.DataType.FLOAT16), feeds(case, np.float16))
    expected = case.expected(np.float16)
    assert context.dtype == np.float16
    np.testing.assert_allclose(context, expected, rtol=0, atol=2 * np.spacing(np.float16(np.abs(expected).max())))


def test_function_bodies_mean_the_same_to_onnx_itself() -> None:
    case = Case(4, 2, 24, 16, lengths=(70, 200), sequence=3, capacity=200)
    found = ReferenceEvaluator(model_of(case)).run(["context"], feeds(case))[0]
    np.testing.assert_allclose(found, meant(case)[1], atol=1e-5)


@pytest.mark.parametrize(("starts", "sequence"), [([0, 0], 70), ([130, 7], 1), ([66], 4)])
def test_over_a_written_cache_both_ops_give_what_the_fused_op_gives(starts: list[int], sequence: int) -> None:
    random, batch, capacity, width = np.random.default_rng(0), len(starts), 140, 32
    query, key, value = (random.standard_normal((batch, sequence, heads * width), np.float32) for heads in (4, 2, 2))
    caches = random.standard_normal((2, batch, 2, capacity, width), np.float32)
    angles = np.outer(np.arange(capacity), 10000.0 ** -(np.arange(0, 16, 2) / 16))
    tables = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    indices = np.array(starts)
    context, keys, values = partial_rope_attention(
        query, key, value, *tables, *caches, indices, heads=4, kv_heads=2, scale=width**-0.5
    )
    positions = indices[:, None] + np.arange(sequence)
    turned = rotate(key.reshape(batch, sequence, 2, width).transpose(0, 2, 1, 3), *tables, positions)
    for row, start in enumerate(starts):
        np.testing.assert_array_equal(keys[row, :, start : start + sequence], turned[row])
    lengths = (indices + sequence).astype(np.int32)
    partials = split_attention(query, *tables, keys, values, lengths, heads=4, kv_heads=2, scale=width**-0.5)
    np.testing.assert_allclose(merge_attention(*partials, lengths), context, atol=1e-5)


@given(st.integers(1, 2000), st.integers(1, 300_000), st.data())
def test_every_key_is_in_a_block_and_many_queries_leave_few_blocks(
    sequence: int, capacity: int, data: st.DataObject
) -> None:
    blocks = blocks_of(sequence, capacity)
    assert 1 <= blocks * sequence <= max(MOST_BLOCKS, sequence)
    length = data.draw(st.integers(1, capacity))
    each = keys_each(length, blocks)
    assert each % GRANULE == 0
    assert each * blocks >= length
    assert each - GRANULE < -(-length // blocks)  # no longer than it must be


def test_what_blocks_give_is_small_whatever_the_capacity() -> None:
    """The figures of the module's docstring, for Minitron-4B's 24 heads of 128."""

    def megabytes(sequence: int) -> float:
        shapes = partial_shapes(1, sequence, 24, 128, 131_072)
        return sum(4 * int(np.prod(shape)) for shape in shapes) / 1e6

    assert megabytes(1) == pytest.approx(0.8, abs=0.05)
    assert megabytes(1024) == pytest.approx(12.8, abs=0.05)


@pytest.mark.parametrize("length", [2, 33])
def test_lengths_that_no_step_leaves_are_refused(length: int) -> None:
    case = Case(1, 1, 16, 16, lengths=(length,), sequence=3, capacity=32)
    with pytest.raises(ValueError, match="capacity 32"):
        meant(case)
