"""The fused op on ONNX Runtime: `com.microsoft::GroupQueryAttention`, which rotates, caches and attends in one node.

Where it cannot rotate, `com.microsoft::RotaryEmbedding` does so before it, on queries and on keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from plugins.ops import is_partial_rope_attention

CONTRIB_DOMAIN = "com.microsoft"
GROUP_QUERY_ATTENTION = "GroupQueryAttention"
ROTARY_EMBEDDING = "RotaryEmbedding"
SCALES_FROM = 12  # the inputs of a quantised cache's scales, of keys and of values
HEAD_STEP, ROTARY_STEP = 8, 16  # what head widths are multiples of, and with rotation inside, head and rotary widths


class CannotLower(Exception):
    """The target has no operator for what a fused op asks; the message says what, and the limit."""


def lower_to_group_query_attention(
    graph: ir.Graph, last_key: ir.Value, total: ir.Value, positions: Callable[[], ir.Value]
) -> list[str]:
    """Replace every `nemotron::PartialRopeAttention` in place.

    GroupQueryAttention takes row b's tokens to stand at the end of its `last_key[b] + 1` valid keys, or, where the step
    is as long as `total`, from position 0 on with padding on the right.

    Args:
        graph: the graph; the rotary tables' width is what makes GroupQueryAttention rotate partially.
        last_key: int32 [batch], index of each row's last valid key after this step.
        total: int32 scalar, the most valid keys of any row.
        positions: makes int64 [batch, sequence], each token's position, for nodes that are not given any and must be
            rotated ahead of the attention.

    Returns:
        Why rotation is an operator of its own, where it is; else nothing.

    Raises:
        CannotLower: a head width that GroupQueryAttention does not take.
    """
    fused = [node for node in graph if is_partial_rope_attention(node)]
    reason = _why_apart(fused[0]) if fused else ""
    turned: ir.Value | None = None
    for node in fused:
        query, key, value, cos, sin, past_key, past_value, _, *given = node.inputs
        before: list[ir.Node] = []
        if reason:
            turned = turned or (given[0] if given else positions())
            before = [_rotary(node, x, heads, turned) for x, heads in ((query, "heads"), (key, "kv_heads"))]
            query, key = (rotary.outputs[0] for rotary in before)
        attention = ir.node(
            GROUP_QUERY_ATTENTION,
            [query, key, value, past_key, past_value, last_key, total, *(() if reason else (cos, sin))],
            {
                "num_heads": node.attributes.get_int("heads"),
                "kv_num_heads": node.attributes.get_int("kv_heads"),
                "scale": node.attributes.get_float("scale"),
                **({} if reason else {"do_rotary": 1, "rotary_interleaved": 0}),
            },
            domain=CONTRIB_DOMAIN,
            num_outputs=3,
            name=node.name,
        )
        for new, old in zip(attention.outputs, node.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [*before, attention], node.outputs, attention.outputs
        )
    return [reason] if reason else []


def quantize_cache(graph: ir.Graph, scales: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> int:
    """Give every GroupQueryAttention a cache of int8, in place.

    It rounds what it caches, after the rotation, to clamp(round_to_even(x · (1 / scale)), −128, 127), and what it
    multiplies is integer · scale, of the step's own keys and values too (tried: so it is in a prefill). Products are
    accumulated in fp32.

    Args:
        graph: lowered, its attentions in the layers' order.
        scales: each layer's, of keys and of values, float32 [kv_heads, head_dim].

    Returns:
        The number of attentions changed.
    """
    attentions = [node for node in graph if node.op_type == GROUP_QUERY_ATTENTION]
    for layer, (node, pair) in enumerate(zip(attentions, scales, strict=True)):
        for cache in (*node.inputs[3:5], *node.outputs[1:3]):
            assert cache is not None
            cache.type = ir.TensorType(ir.DataType.INT8)
        node.resize_inputs(SCALES_FROM + 2)
        for place, (name, scale) in enumerate(zip(("key", "value"), pair, strict=True)):
            full = f"cache.{layer}.{name}.scale"
            given = ir.val(full, const_value=ir.tensor(scale[None, :, None], name=full))  # [1, kv_heads, 1, head_dim]
            graph.initializers.add(given)
            node.replace_input_with(SCALES_FROM + place, given)
            node.attributes[f"{name[0]}_quant_type"] = ir.AttrString(f"{name[0]}_quant_type", "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
    return len(attentions)


def _why_apart(node: ir.Node) -> str:
    """Why GroupQueryAttention cannot rotate what this node rotates; empty where it can."""
    head, rotary = (node.attributes.get_int(name) or 0 for name in ("head_dim", "rotary_dim"))
    if head % HEAD_STEP:
        raise CannotLower(
            f"head width {head} is not a multiple of {HEAD_STEP}, which ONNX Runtime's GroupQueryAttention needs"
        )
    problem = ""
    if head % ROTARY_STEP or rotary % ROTARY_STEP:
        problem = f"head_dim {head} and rotary_dim {rotary} are not both multiples of {ROTARY_STEP}"
    elif len(node.inputs) > 8:  # its input of that name is not read by the CPU's kernel
        problem = "position_ids are given"
    return f"rotation by {CONTRIB_DOMAIN}::{ROTARY_EMBEDDING}, ahead of the attention: {problem}" if problem else ""


def _rotary(node: ir.Node, x: ir.Value | None, heads: str, positions: ir.Value | None) -> ir.Node:
    _, _, _, cos, sin, *_ = node.inputs
    head, width = (node.attributes.get_int(name) for name in ("head_dim", "rotary_dim"))
    rotary = ir.node(
        ROTARY_EMBEDDING,
        [x, positions, cos, sin],
        {
            "num_heads": node.attributes.get_int(heads),
            "rotary_embedding_dim": 0 if width == head else width,
            "interleaved": 0,
        },
        domain=CONTRIB_DOMAIN,
        name=f"{node.name}.{heads}.rotary",
    )
    if x is not None:
        rotary.outputs[0].shape, rotary.outputs[0].type = x.shape, x.type
    return rotary
