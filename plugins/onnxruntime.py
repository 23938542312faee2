"""The fused op on ONNX Runtime: `com.microsoft::GroupQueryAttention`, which rotates, caches and attends in one node.

Where it cannot rotate, `com.microsoft::RotaryEmbedding` does so before it, on queries and on keys.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from plugins.ops import is_partial_rope_attention

CONTRIB_DOMAIN = "com.microsoft"
GROUP_QUERY_ATTENTION = "GroupQueryAttention"
ROTARY_EMBEDDING = "RotaryEmbedding"
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
