"""`nemotron::PartialRopeAttention`: its signature, and its meaning as an ONNX function in standard operators.

| input           | type  | shape                                      |
|-----------------|-------|--------------------------------------------|
| `query`         | float | [batch, sequence, heads·head_dim]          |
| `key`, `value`  | float | [batch, sequence, kv_heads·head_dim]       |
| `cos`, `sin`    | float | [max_position, rotary_dim/2]               |
| `past_key`, `past_value` | float | [batch, kv_heads, capacity, head_dim] |
| `write_indices` | int64 | [batch]                                    |

Row b's new tokens stand at positions `write_indices[b] + 0 … sequence-1`. The first `rotary_dim` channels of every
query and key head are rotated by their position (the two halves of those channels are the pair, as in GPT-NeoX); keys
and values are written into the cache at those positions; query i of row b attends to cache positions up to and
including `write_indices[b] + i`. Outputs: `context` [batch, sequence, heads·head_dim], and the two caches, updated.
A write past `capacity` is undefined: the caller refuses it.

Attributes: `heads`, `kv_heads`, `head_dim`, `rotary_dim` (ints), `scale` (float, multiplies q·k).
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

DOMAIN = "nemotron"
PARTIAL_ROPE_ATTENTION = "PartialRopeAttention"
DOMAIN_VERSION = 1
BODY_OPSET = 24

_BODY = """
<domain: "nemotron", opset_import: ["" : 24]>
PartialRopeAttention <heads, kv_heads, head_dim, rotary_dim, scale>
    (query, key, value, cos, sin, past_key, past_value, write_indices) => (context, present_key, present_value)
{
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    column = Constant <value_ints: ints = [1]> ()
    keep = Constant <value_ints: ints = [0, 0]> ()
    flatten = Constant <value_ints: ints = [0, 0, -1]> ()
    head_count = Constant <value_int: int = @heads> ()
    kv_head_count = Constant <value_int: int = @kv_heads> ()
    width = Constant <value_int: int = @head_dim> ()
    head_column = Unsqueeze (head_count, zero)
    kv_head_column = Unsqueeze (kv_head_count, zero)
    width_column = Unsqueeze (width, zero)
    split = Concat <axis: int = 0> (keep, head_column, width_column)
    kv_split = Concat <axis: int = 0> (keep, kv_head_column, width_column)

    sequence_column = Shape <start: int = 1, end: int = 2> (query)
    sequence = Squeeze (sequence_column)
    steps = Range (zero, sequence, one)
    starts = Unsqueeze (write_indices, column)
    positions = Add (starts, steps)
    lengths = Add (write_indices, sequence_column)

    query_rotated = RotaryEmbedding <num_heads: int = @heads, rotary_embedding_dim: int = @rotary_dim>
        (query, cos, sin, positions)
    key_rotated = RotaryEmbedding <num_heads: int = @kv_heads, rotary_embedding_dim: int = @rotary_dim>
        (key, cos, sin, positions)
    query_split = Reshape (query_rotated, split)
    key_split = Reshape (key_rotated, kv_split)
    value_split = Reshape (value, kv_split)
    query_heads = Transpose <perm: ints = [0, 2, 1, 3]> (query_split)
    key_heads = Transpose <perm: ints = [0, 2, 1, 3]> (key_split)
    value_heads = Transpose <perm: ints = [0, 2, 1, 3]> (value_split)

    present_key = TensorScatter <axis: int = -2> (past_key, key_heads, write_indices)
    present_value = TensorScatter <axis: int = -2> (past_value, value_heads, write_indices)
    context_heads = Attention <is_causal: int = 1, scale: float = @scale>
        (query_heads, present_key, present_value, , , , lengths)
    context_split = Transpose <perm: ints = [0, 2, 1, 3]> (context_heads)
    context = Reshape (context_split, flatten)
}
"""


def partial_rope_attention_function() -> ir.Function:
    """The op as an ONNX function of opset 24, so that a graph which still holds it runs on any runtime."""
    return ir.serde.deserialize_function(onnx.parser.parse_function(_BODY))


def is_partial_rope_attention(node: ir.Node) -> bool:
    """Whether a node is the fused op."""
    return node.domain == DOMAIN and node.op_type == PARTIAL_ROPE_ATTENTION
