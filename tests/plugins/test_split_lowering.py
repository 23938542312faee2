"""The fused op by blocks of keys, over a cache written before: one graph for TensorRT and for ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from plugins.ops import BODY_OPSET, DOMAIN, PARTIAL_ROPE_ATTENTION
from plugins.reference import partial_rope_attention
from plugins.split_attention import merge_attention_function, split_attention_function
from plugins.split_lowering import find_attentions, put_split_attention
from plugins.standard import lower_to_standard_attention

HEADS, KV_HEADS, WIDTH, ROTARY, CAPACITY = 4, 2, 32, 16, 150
OUTPUTS = ("context", "present_key", "present_value")


def fused_model() -> ir.Model:
    """One fused op, with `input_ids` beside its inputs."""
    cache = ["batch", KV_HEADS, "capacity", WIDTH]
    query, projected = (["batch", "sequence", heads * WIDTH] for heads in (HEADS, KV_HEADS))
    table = [CAPACITY, ROTARY // 2]
    shapes: dict[str, list[int | str]] = {
        "query": query,
        "key": projected,
        "value": projected,
        "cos": table,
        "sin": table,
        "past_key": cache,
        "past_value": cache,
    }
    floats = [ir.val(name, dtype=ir.DataType.FLOAT, shape=dims) for name, dims in shapes.items()]
    write_indices = ir.val("write_indices", dtype=ir.DataType.INT64, shape=["batch"])
    input_ids = ir.val("input_ids", dtype=ir.DataType.INT64, shape=["batch", "sequence"])
    node = ir.node(
        PARTIAL_ROPE_ATTENTION,
        [*floats, write_indices],
        {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": WIDTH, "rotary_dim": ROTARY, "scale": WIDTH**-0.5},
        domain=DOMAIN,
        num_outputs=3,
    )
    for output, name, dims in zip(node.outputs, OUTPUTS, (query, cache, cache), strict=True):
        output.name, output.dtype, output.shape = name, ir.DataType.FLOAT, ir.Shape(dims)
    graph = ir.Graph(
        [*floats, write_indices, input_ids],
        node.outputs,
        nodes=[node],
        opset_imports={"": BODY_OPSET, DOMAIN: 1},
        name="fused",
    )
    return ir.Model(graph, ir_version=11, functions=[split_attention_function(), merge_attention_function()])


@pytest.mark.parametrize(
    ("starts", "sequence"), [([0, 0], 70), ([149, 7], 1), ([66], 4)], ids=["prefill", "decode", "chunk"]
)
def test_the_lowered_graph_gives_what_the_fused_op_means(starts: list[int], sequence: int) -> None:
    random, batch = np.random.default_rng(0), len(starts)
    projected = [random.standard_normal((batch, sequence, heads * WIDTH), np.float32) for heads in (4, 2, 2)]
    angles = np.outer(np.arange(CAPACITY), 10000.0 ** -(np.arange(0, ROTARY, 2) / ROTARY))
    caches = random.standard_normal((2, batch, KV_HEADS, CAPACITY, WIDTH), np.float32)
    values = [*projected, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32), *caches]
    indices = np.array(starts)
    expected = partial_rope_attention(*values, indices, heads=HEADS, kv_heads=KV_HEADS, scale=WIDTH**-0.5)

    model = fused_model()
    *_, write_indices, input_ids = model.graph.inputs
    assert lower_to_standard_attention(model.graph, input_ids, write_indices) == 1
    found = find_attentions(model.graph, input_ids, write_indices)
    put_split_attention(model.graph, found)
    operators = [node.op_type for node in model.graph]
    assert [operators.count(name) for name in ("RotaryEmbedding", "TensorScatter", "Attention")] == [1, 2, 0]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    names = [value.name for value in model.graph.inputs]
    given = [*values, indices, np.zeros((batch, sequence), np.int64)]
    for ours, theirs in zip(session.run(list(OUTPUTS), dict(zip(names, given, strict=True))), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
