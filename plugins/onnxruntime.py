"""The fused op on ONNX Runtime: `com.microsoft::GroupQueryAttention`, which rotates, caches and attends in one node."""

from __future__ import annotations

import onnx_ir as ir

from plugins.ops import is_partial_rope_attention

CONTRIB_DOMAIN = "com.microsoft"
GROUP_QUERY_ATTENTION = "GroupQueryAttention"


class CannotLower(Exception):
    """The target has no operator for what a fused op asks; the message says what, and the limit."""


def lower_to_group_query_attention(graph: ir.Graph, last_key: ir.Value, total: ir.Value) -> int:
    """Replace every `nemotron::PartialRopeAttention` in place.

    GroupQueryAttention takes row b's tokens to stand at the end of its `last_key[b] + 1` valid keys, or, where the step
    is as long as `total`, from position 0 on with padding on the right.

    Args:
        graph: the graph; the rotary tables' width is what makes GroupQueryAttention rotate partially.
        last_key: int32 [batch], index of each row's last valid key after this step.
        total: int32 scalar, the most valid keys of any row.

    Returns:
        The number of nodes replaced.

    Raises:
        CannotLower: a head or rotary width that GroupQueryAttention does not take.
    """
    fused = [node for node in graph if is_partial_rope_attention(node)]
    for node in fused:
        _check_widths(node)
        query, key, value, cos, sin, past_key, past_value, _ = node.inputs
        attention = ir.node(
            GROUP_QUERY_ATTENTION,
            [query, key, value, past_key, past_value, last_key, total, cos, sin],
            {
                "num_heads": node.attributes.get_int("heads"),
                "kv_num_heads": node.attributes.get_int("kv_heads"),
                "scale": node.attributes.get_float("scale"),
                "do_rotary": 1,
                "rotary_interleaved": 0,
            },
            domain=CONTRIB_DOMAIN,
            num_outputs=3,
            name=node.name,
        )
        for new, old in zip(attention.outputs, node.outputs, strict=True):
            new.shape, new.type = old.shape, old.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], [attention], node.outputs, attention.outputs)
    return len(fused)


def _check_widths(node: ir.Node) -> None:
    for what, name, step in (("head", "head_dim", 8), ("rotary", "rotary_dim", 16)):
        width = node.attributes.get_int(name)
        if width is None or width % step:
            raise CannotLower(
                f"{what} width {width} is not a multiple of {step}, which ONNX Runtime's GroupQueryAttention needs"
            )
