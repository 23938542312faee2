"""The fused ops: their signatures, and their meaning as ONNX functions in standard operators.

`nemotron::PartialRopeAttention`, over a cache:

| input           | type  | shape                                      |
|-----------------|-------|--------------------------------------------|
| `query`         | float | [batch, sequence, heads·head_dim]          |
| `key`, `value`  | float | [batch, sequence, kv_heads·head_dim]       |
| `cos`, `sin`    | float | [max_position, rotary_dim/2]               |
| `past_key`, `past_value` | float | [batch, kv_heads, capacity, head_dim] |
| `write_indices` | int64 | [batch]                                    |
| `position_ids`, optional | int64 | [batch, sequence]                 |

Row b's new tokens stand at positions `write_indices[b] + 0 … sequence-1`. The first `rotary_dim` channels of every
query and key head are rotated by their position, or by `position_ids` where they are given (the two halves of those
channels are the pair, as in GPT-NeoX); keys and values are written into the cache at those positions; query i of row b
attends to cache positions up to and including `write_indices[b] + i`. Outputs: `context` [batch, sequence,
heads·head_dim], and the two caches, updated. A write past `capacity` is undefined: the caller refuses it.

`nemotron::PartialRopeSelfAttention`, of whole rows without a cache: `query`, `key`, `value`, `cos` and `sin` as above,
`position_ids` [batch, sequence], and `attention_mask` int64 [batch, sequence], not 0 for real tokens. A query sees the
real tokens at or before it, and itself: what stands for padding has a finite value that no real token sees. Outputs:
`context`, and `weights` [batch, heads, sequence, sequence], the softmax that the values are multiplied with.

Attributes of both: `heads`, `kv_heads`, `head_dim`, `rotary_dim` (ints), `scale` (float, multiplies q·k).
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

DOMAIN = "nemotron"
PARTIAL_ROPE_ATTENTION = "PartialRopeAttention"
PARTIAL_ROPE_SELF_ATTENTION = "PartialRopeSelfAttention"
DOMAIN_VERSION = 1
BODY_OPSET = 24

_SPLIT = """
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
"""

_ROTATE = """
    query_rotated = RotaryEmbedding <num_heads: int = @heads, rotary_embedding_dim: int = @rotary_dim>
        (query, cos, sin, position_ids)
    key_rotated = RotaryEmbedding <num_heads: int = @kv_heads, rotary_embedding_dim: int = @rotary_dim>
        (key, cos, sin, position_ids)
    query_split = Reshape (query_rotated, split)
    key_split = Reshape (key_rotated, kv_split)
    value_split = Reshape (value, kv_split)
    query_heads = Transpose <perm: ints = [0, 2, 1, 3]> (query_split)
    key_heads = Transpose <perm: ints = [0, 2, 1, 3]> (key_split)
    value_heads = Transpose <perm: ints = [0, 2, 1, 3]> (value_split)
"""

_MERGE = """
    context_split = Transpose <perm: ints = [0, 2, 1, 3]> (context_heads)
    context = Reshape (context_split, flatten)
"""

_DERIVED_POSITIONS = """
    starts = Unsqueeze (write_indices, column)
    position_ids = Add (starts, steps)
"""

_CACHED = """
    lengths = Add (write_indices, sequence_column)
    present_key = TensorScatter <axis: int = -2> (past_key, key_heads, write_indices)
    present_value = TensorScatter <axis: int = -2> (past_value, value_heads, write_indices)
    context_heads = Attention <is_causal: int = 1, scale: float = @scale>
        (query_heads, present_key, present_value, , , , lengths)
"""

_MASKED = """
    queries = Unsqueeze (steps, one)
    keys = Unsqueeze (steps, zero)
    before = LessOrEqual (keys, queries)
    itself = Equal (keys, queries)
    mask_axes = Constant <value_ints: ints = [1, 2]> ()
    given = Unsqueeze (attention_mask, mask_axes)
    padding = Equal (given, zero)
    real = Not (padding)
    seen = Or (real, itself)
    visible = And (before, seen)
    context_heads, , , weights = Attention <scale: float = @scale, qk_matmul_output_mode: int = 3>
        (query_heads, key_heads, value_heads, visible)
"""

_ATTRIBUTES = "<heads, kv_heads, head_dim, rotary_dim, scale>"
_CACHED_INPUTS = "query, key, value, cos, sin, past_key, past_value, write_indices"


def partial_rope_attention_function(*, position_ids: bool = False) -> ir.Function:
    """The op over a cache as an ONNX function of opset 24, so that a graph which still holds it runs on any runtime.

    Args:
        position_ids: for nodes that are given positions; a function's body cannot tell.
    """
    inputs = f"{_CACHED_INPUTS}, position_ids" if position_ids else _CACHED_INPUTS
    derived = "" if position_ids else _DERIVED_POSITIONS
    return onnx_function(
        f"{PARTIAL_ROPE_ATTENTION} {_ATTRIBUTES} ({inputs}) => (context, present_key, present_value)",
        _SPLIT + derived + _ROTATE + _CACHED + _MERGE,
    )


def partial_rope_self_attention_function() -> ir.Function:
    """The op of whole rows as an ONNX function of opset 24."""
    return onnx_function(
        f"{PARTIAL_ROPE_SELF_ATTENTION} {_ATTRIBUTES} "
        "(query, key, value, cos, sin, position_ids, attention_mask) => (context, weights)",
        _SPLIT + _ROTATE + _MASKED + _MERGE,
    )


def is_partial_rope_attention(node: ir.Node) -> bool:
    """Whether a node is the fused op over a cache."""
    return node.domain == DOMAIN and node.op_type == PARTIAL_ROPE_ATTENTION


def is_partial_rope_self_attention(node: ir.Node) -> bool:
    """Whether a node is the fused op of whole rows."""
    return node.domain == DOMAIN and node.op_type == PARTIAL_ROPE_SELF_ATTENTION


def is_fused(node: ir.Node) -> bool:
    """Whether a node is either of the fused ops."""
    return is_partial_rope_attention(node) or is_partial_rope_self_attention(node)


def onnx_function(signature: str, body: str) -> ir.Function:
    """A function of DOMAIN in ONNX's text, whose body is of BODY_OPSET."""
    text = f'<domain: "{DOMAIN}", opset_import: ["" : {BODY_OPSET}]>\n{signature}\n{{{body}}}'
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
