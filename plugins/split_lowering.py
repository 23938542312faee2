"""The fused op by SplitAttention and MergeAttention, over a cache that RotaryEmbedding and TensorScatter write."""

from __future__ import annotations

import onnx_ir as ir

from plugins.nodes import Nodes
from plugins.onnxruntime import CannotLower
from plugins.ops import DOMAIN, is_partial_rope_attention
from plugins.split_attention import MERGE_ATTENTION, SPLIT_ATTENTION
from plugins.standard import Heads, replace

_SHAPES = ("heads", "kv_heads", "head_dim", "rotary_dim")


def lower_to_split_attention(graph: ir.Graph, input_ids: ir.Value, write_indices: ir.Value) -> int:
    """Replace every `nemotron::PartialRopeAttention` in place.

    Args:
        graph: the graph; outputs of its fused nodes have a type, the context's is MergeAttention's.
        input_ids: int64 [batch, sequence], whose second dimension is the step's length.
        write_indices: int64 [batch], the position of each row's first new token.

    Returns:
        The number of nodes replaced.

    Raises:
        CannotLower: a node that is given positions, which SplitAttention takes from the lengths.
    """
    fused = [node for node in graph if is_partial_rope_attention(node)]
    if any(len(node.inputs) > 8 for node in fused):
        raise CannotLower(f"{SPLIT_ATTENTION} takes positions from the lengths of rows, and position_ids are given")
    if not fused:
        return 0
    build = Nodes(graph, "attention")
    sequence = build("Shape", input_ids, start=1, end=2)
    steps = build("Range", build.constant("zero", 0), build("Squeeze", sequence), build.constant("one", 1))
    positions = build("Add", build("Unsqueeze", write_indices, build.constant("column", [1])), steps)
    lengths = build("Cast", build("Add", write_indices, sequence), to=int(ir.DataType.INT32))
    graph.insert_before(next(iter(graph)), build.take())
    for node in fused:
        replace(graph, node, build, _split(build, node, positions, lengths))
    return len(fused)


def _split(build: Nodes, node: ir.Node, positions: ir.Value, lengths: ir.Value) -> list[ir.Value]:
    query, key, value, cos, sin, past_key, past_value, write_indices = node.inputs
    heads = Heads(build, node, (cos, sin, positions))

    def write(cache: ir.Value | None, x: ir.Value) -> ir.Value:
        return build("TensorScatter", cache, x, write_indices, axis=-2, mode="linear")

    present_key = write(past_key, heads.rotated(key, "kv_heads"))
    present_value = write(past_value, heads.split(value, "kv_heads"))
    attributes = {name: node.attributes.get_int(name) for name in _SHAPES}
    scale, dtype = node.attributes.get_float("scale"), node.outputs[0].dtype
    if dtype is None:
        raise CannotLower(f"{node.name}: its context has no type")
    cached = (query, cos, sin, present_key, present_value, lengths)
    partials = build.many(SPLIT_ATTENTION, 3, *cached, domain=DOMAIN, **attributes, scale=scale)
    (context,) = build.many(MERGE_ATTENTION, 1, *partials, lengths, domain=DOMAIN, to=int(dtype))
    return [context, present_key, present_value]
