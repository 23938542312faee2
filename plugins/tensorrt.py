"""The fused op for TensorRT: standard operators of opset 24 that its parser turns into native layers.

Rotary embedding, cache update and attention each have a native layer. The ONNX alone is complete and portable: ONNX
Runtime runs it too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from plugins.ops import is_partial_rope_attention

ATTENTION = "Attention"
_HEADS_FIRST = [0, 2, 1, 3]


def lower_to_standard_attention(graph: ir.Graph, input_ids: ir.Value, write_indices: ir.Value) -> int:
    """Replace every `nemotron::PartialRopeAttention` in place by RotaryEmbedding, TensorScatter and Attention.

    Args:
        graph: the graph.
        input_ids: int64 [batch, sequence], whose second dimension is the step's length.
        write_indices: int64 [batch], the position of each row's first new token.

    Returns:
        The number of nodes replaced.
    """
    fused = [node for node in graph if is_partial_rope_attention(node)]
    if not fused:
        return 0
    build = _Builder(graph)
    sequence = build("Shape", input_ids, start=1, end=2)
    steps = build("Range", build.constant("zero", 0), build("Squeeze", sequence), build.constant("one", 1))
    positions = build("Add", build("Unsqueeze", write_indices, build.constant("column", [1])), steps)
    lengths = build("Add", write_indices, sequence)
    graph.insert_before(next(iter(graph)), build.take())
    for node in fused:
        outputs = _lower(build, node, positions, lengths)
        for new, old in zip(outputs, node.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], build.take(), node.outputs, outputs)
    return len(fused)


def _lower(build: _Builder, node: ir.Node, positions: ir.Value, lengths: ir.Value) -> list[ir.Value]:
    query, key, value, cos, sin, past_key, past_value, write_indices = node.inputs
    attributes = node.attributes
    heads, kv_heads = attributes.get_int("heads"), attributes.get_int("kv_heads")
    width, rotary_dim = attributes.get_int("head_dim"), attributes.get_int("rotary_dim")

    def split(x: ir.Value | None, count: int | None) -> ir.Value:
        shape = build.constant(f"split_{count}x{width}", [0, 0, count, width])
        return build("Transpose", build("Reshape", x, shape), perm=_HEADS_FIRST)

    def rotate(x: ir.Value) -> ir.Value:
        return build("RotaryEmbedding", x, cos, sin, positions, interleaved=0, rotary_embedding_dim=rotary_dim)

    def write(cache: ir.Value | None, x: ir.Value) -> ir.Value:
        return build("TensorScatter", cache, x, write_indices, axis=-2, mode="linear")

    present_key = write(past_key, rotate(split(key, kv_heads)))
    present_value = write(past_value, split(value, kv_heads))
    attention = build(
        "Attention",
        *(rotate(split(query, heads)), present_key, present_value, None, None, None, lengths),
        is_causal=1,
        scale=attributes.get_float("scale"),
    )
    merged = build("Transpose", attention, perm=_HEADS_FIRST)
    context = build("Reshape", merged, build.constant("merge", [0, 0, -1]))
    return [context, present_key, present_value]


class _Builder:
    """Makes nodes, and each constant once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._tape = ir.tape.Tape()

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self._tape.op(op_type, list(inputs), attributes)

    def constant(self, name: str, value: Any) -> ir.Value:
        name = f"attention.{name}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(np.asarray(value, np.int64), name=name)
            self._graph.initializers.add(ir.val(name, const_value=tensor))
        return self._graph.initializers[name]

    def take(self) -> list[ir.Node]:
        """The nodes made since the last call."""
        nodes, self._tape = list(self._tape.nodes), ir.tape.Tape()
        return nodes
