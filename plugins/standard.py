"""The fused ops in standard operators of opset 24, which TensorRT's parser turns into native layers.

Rotary embedding, cache update and attention each have a native layer. The ONNX alone is complete and portable: ONNX
Runtime runs it too, and graphs without a cache take this form for either target.
"""

from __future__ import annotations

import onnx_ir as ir

from plugins.nodes import Nodes
from plugins.ops import is_partial_rope_attention, is_partial_rope_self_attention

ATTENTION = "Attention"
_HEADS_FIRST = [0, 2, 1, 3]
_AFTER_SOFTMAX = 3  # the qk_matmul_output_mode that hands out attention weights


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
    build = Nodes(graph, "attention")
    sequence = build("Shape", input_ids, start=1, end=2)
    steps = build("Range", build.constant("zero", 0), build("Squeeze", sequence), build.constant("one", 1))
    positions = build("Add", build("Unsqueeze", write_indices, build.constant("column", [1])), steps)
    lengths = build("Add", write_indices, sequence)
    graph.insert_before(next(iter(graph)), build.take())
    for node in fused:
        replace(graph, node, build, _cached(build, node, positions, lengths))
    return len(fused)


def lower_to_masked_attention(graph: ir.Graph, attention_mask: ir.Value) -> int:
    """Replace every `nemotron::PartialRopeSelfAttention` in place by RotaryEmbedding and Attention with a mask.

    Args:
        graph: the graph.
        attention_mask: int64 [batch, sequence], an input.

    Returns:
        The number of nodes replaced.
    """
    fused = [node for node in graph if is_partial_rope_self_attention(node)]
    if not fused:
        return 0
    build = Nodes(graph, "attention")
    visible = _visible(build, attention_mask)
    graph.insert_before(next(iter(graph)), build.take())
    for node in fused:
        replace(graph, node, build, _masked(build, node, visible))
    return len(fused)


def replace(graph: ir.Graph, node: ir.Node, build: Nodes, outputs: list[ir.Value]) -> None:
    """Put what was built in a fused node's place, and its outputs in the place of the node's."""
    for new, old in zip(outputs, node.outputs, strict=True):
        new.shape, new.type = old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], build.take(), node.outputs, outputs)


def _cached(build: Nodes, node: ir.Node, positions: ir.Value, lengths: ir.Value) -> list[ir.Value]:
    query, key, value, cos, sin, past_key, past_value, write_indices, *given = node.inputs
    heads = _Heads(build, node, (cos, sin, given[0] if given else positions))

    def write(cache: ir.Value | None, x: ir.Value) -> ir.Value:
        return build("TensorScatter", cache, x, write_indices, axis=-2, mode="linear")

    present_key = write(past_key, heads.rotated(key, "kv_heads"))
    present_value = write(past_value, heads.split(value, "kv_heads"))
    attention = build(
        ATTENTION,
        *(heads.rotated(query, "heads"), present_key, present_value, None, None, None, lengths),
        is_causal=1,
        scale=node.attributes.get_float("scale"),
    )
    return [heads.merged(attention), present_key, present_value]


def _masked(build: Nodes, node: ir.Node, visible: ir.Value) -> list[ir.Value]:
    query, key, value, cos, sin, positions, _ = node.inputs
    heads = _Heads(build, node, (cos, sin, positions))
    inputs = (heads.rotated(query, "heads"), heads.rotated(key, "kv_heads"), heads.split(value, "kv_heads"), visible)
    scale, weights = node.attributes.get_float("scale"), node.outputs[1]
    if weights.uses() or weights.is_graph_output():
        attention, _, _, given = build.many(ATTENTION, 4, *inputs, scale=scale, qk_matmul_output_mode=_AFTER_SOFTMAX)
        return [heads.merged(attention), given]
    return [heads.merged(build(ATTENTION, *inputs, scale=scale)), ir.Value(name=weights.name)]


def _visible(build: Nodes, attention_mask: ir.Value) -> ir.Value:
    """bool [batch, 1, sequence, sequence]: keys at or before the query that are real, or the query's own."""
    sequence = build("Squeeze", build("Shape", attention_mask, start=1, end=2))
    steps = build("Range", build.constant("zero", 0), sequence, build.constant("one", 1))
    queries = build("Unsqueeze", steps, build.constant("column", [1]))
    keys = build("Unsqueeze", steps, build.constant("row", [0]))
    given = build("Unsqueeze", attention_mask, build.constant("heads_and_queries", [1, 2]))
    real = build("Not", build("Equal", given, build.constant("zero", 0)))
    return build("And", build("LessOrEqual", keys, queries), build("Or", real, build("Equal", keys, queries)))


class _Heads:
    """Splits, rotates and merges the heads of one fused node."""

    def __init__(self, build: Nodes, node: ir.Node, rotation: tuple[ir.Value | None, ...]) -> None:
        self._build, self._attributes, self._rotation = build, node.attributes, rotation

    def split(self, x: ir.Value | None, heads: str) -> ir.Value:
        """[batch, heads, sequence, head_dim]; `heads` is the attribute that counts them."""
        count, width = self._attributes.get_int(heads), self._attributes.get_int("head_dim")
        shape = self._build.constant(f"split_{count}x{width}", [0, 0, count, width])
        return self._build("Transpose", self._build("Reshape", x, shape), perm=_HEADS_FIRST)

    def rotated(self, x: ir.Value | None, heads: str) -> ir.Value:
        """The same, rotated."""
        width = self._attributes.get_int("rotary_dim")
        split = self.split(x, heads)
        return self._build("RotaryEmbedding", split, *self._rotation, interleaved=0, rotary_embedding_dim=width)

    def merged(self, context: ir.Value) -> ir.Value:
        """[batch, sequence, heads·head_dim]."""
        merged = self._build("Transpose", context, perm=_HEADS_FIRST)
        return self._build("Reshape", merged, self._build.constant("merge", [0, 0, -1]))
