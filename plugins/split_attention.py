"""Attention over the length of a cache and not its capacity, as two ops: by blocks of keys, then merged.

Both are what a kernel each computes (`plugins.kernels`), and a third form of `nemotron::PartialRopeAttention`: the
cache is written before them, by RotaryEmbedding and TensorScatter on the step's keys and values.

`nemotron::SplitAttention`:

| input     | type          | shape                                   |
|-----------|---------------|-----------------------------------------|
| `query`   | float         | [batch, sequence, heads·head_dim], not rotated |
| `cos`, `sin` | as `query` | [max_position, rotary_dim/2]            |
| `key_cache`, `value_cache` | as `query` | [batch, kv_heads, capacity, head_dim] |
| `lengths` | int32         | [batch], the keys that each row has, the step's own included |

| output     | type    | shape                                      |
|------------|---------|--------------------------------------------|
| `maxima`   | float32 | [batch, heads, sequence, blocks]           |
| `sums`     | float32 | [batch, heads, sequence, blocks]           |
| `contexts` | float32 | [batch, heads, sequence, blocks, head_dim] |

Query i of row b stands at position `lengths[b] - sequence + i`; its first `rotary_dim` channels are rotated by that, as
in `PartialRopeAttention`, and rounded to the query's type. It sees the keys at or before its position. Row b's keys are
divided into `blocks_of(sequence, capacity)` blocks of `keys_each(lengths[b], blocks)` keys; a block gives the greatest
of the scores (scale · q·k) that it sees, the sum of exp(score − greatest), and that sum weighted with the values. Where
a query sees no key of a block, the block's outputs are undefined: they are not written. Attributes: `heads`,
`kv_heads`, `head_dim`, `rotary_dim` (ints), `scale` (float).

`nemotron::MergeAttention` takes the three outputs and `lengths`, and gives `context` [batch, sequence, heads·head_dim]
of the type that its attribute `to` names (an ONNX type, as Cast's). It reads only the blocks that a query sees.

How many blocks there are follows from the shapes alone, as TensorRT needs it, but how long they are from the length: a
short row in a large cache is worked on by as many programs as a long one. Many queries are parallel work enough and
take fewer blocks, so that the partial results stay small. For Minitron-4B (24 heads of 128) at a capacity of 131 072, a
row's are 0.8 MB for a step of one token and 12.8 MB for a chunk of 1024 (64 blocks and 1); a block for every 64 keys of
the capacity would be 25.6 MB and 26 GB.
"""

from __future__ import annotations

import onnx_ir as ir

from plugins.ops import onnx_function

SPLIT_ATTENTION = "SplitAttention"
MERGE_ATTENTION = "MergeAttention"
GRANULE = 64  # blocks are multiples of so many keys
MOST_BLOCKS = 64  # of a step of one token

_LENGTHS = f"""
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    column = Constant <value_ints: ints = [1]> ()
    last = Constant <value_ints: ints = [-1]> ()
    granule = Constant <value_int: int = {GRANULE}> ()
    round_up = Constant <value_int: int = {GRANULE - 1}> ()
    lowest = Constant <value_float: float = -1e30> ()
    nothing = Constant <value_float: float = 0.0> ()
    length = Cast <to: int = 7> (lengths)
    past = Sub (length, sequence)
    past_column = Unsqueeze (past, column)
    steps = Range (zero, sequence, one)
    positions = Add (past_column, steps)
    length_rounded = Add (length, round_up)
    granules = Div (length_rounded, granule)
    granules_more = Add (granules, blocks)
    granules_rounded = Sub (granules_more, one)
    granules_each = Div (granules_rounded, blocks)
    keys_each = Mul (granules_each, granule)
    block_numbers = Range (zero, blocks, one)
"""

_SPLIT_SIZES = f"""
    sequence_column = Shape <start: int = 1, end: int = 2> (query)
    sequence = Squeeze (sequence_column)
    capacity_column = Shape <start: int = 2, end: int = 3> (key_cache)
    capacity = Squeeze (capacity_column)
    least_blocks = Constant <value_int: int = 1> ()
    most_blocks = Constant <value_int: int = {MOST_BLOCKS}> ()
    keys_to_round = Constant <value_int: int = {GRANULE - 1}> ()
    keys_of_granule = Constant <value_int: int = {GRANULE}> ()
    capacity_rounded = Add (capacity, keys_to_round)
    capacity_granules = Div (capacity_rounded, keys_of_granule)
    blocks_for_sequence = Div (most_blocks, sequence)
    blocks_needed = Min (capacity_granules, blocks_for_sequence)
    blocks = Max (least_blocks, blocks_needed)
"""

_SPLIT_KEYS = """
    widest_more = Add (capacity_granules, blocks)
    widest_rounded = Sub (widest_more, one)
    widest_granules = Div (widest_rounded, blocks)
    widest = Mul (widest_granules, granule)
    offsets = Range (zero, widest, one)
    each_column = Unsqueeze (keys_each, column)
    begins = Mul (each_column, block_numbers)
    begins_column = Unsqueeze (begins, last)
    index = Add (begins_column, offsets)
    two_columns = Constant <value_ints: ints = [1, 2]> ()
    each_wide = Unsqueeze (keys_each, two_columns)
    length_wide = Unsqueeze (length, two_columns)
    in_block = Less (offsets, each_wide)
    in_row = Less (index, length_wide)
    inside = And (in_block, in_row)
    last_key = Sub (capacity, one)
    index_within = Min (index, last_key)
    gathered = Unsqueeze (index_within, last)
    inside_axes = Constant <value_ints: ints = [1, 4]> ()
    inside_values = Unsqueeze (inside, inside_axes)
    keys_by_position = Transpose <perm: ints = [0, 2, 1, 3]> (key_cache)
    keys_gathered = GatherND <batch_dims: int = 1> (keys_by_position, gathered)
    keys_exact = Cast <to: int = 1> (keys_gathered)
    keys_of_heads = Transpose <perm: ints = [0, 3, 1, 2, 4]> (keys_exact)
    keys = Where (inside_values, keys_of_heads, nothing)
    values_by_position = Transpose <perm: ints = [0, 2, 1, 3]> (value_cache)
    values_gathered = GatherND <batch_dims: int = 1> (values_by_position, gathered)
    values_exact = Cast <to: int = 1> (values_gathered)
    values_of_heads = Transpose <perm: ints = [0, 3, 1, 2, 4]> (values_exact)
    values = Where (inside_values, values_of_heads, nothing)
"""

# Rows are the query heads of a key/value head, token by token: [batch, kv_heads, 1, sequence·group, head_dim].
_SPLIT_QUERIES = """
    keep = Constant <value_ints: ints = [0, 0]> ()
    keep_three = Constant <value_ints: ints = [0, 0, 0]> ()
    keep_one = Constant <value_ints: ints = [0]> ()
    head_count = Constant <value_int: int = @heads> ()
    kv_head_count = Constant <value_int: int = @kv_heads> ()
    width = Constant <value_int: int = @head_dim> ()
    group = Div (head_count, kv_head_count)
    head_column = Unsqueeze (head_count, zero)
    kv_head_column = Unsqueeze (kv_head_count, zero)
    group_column = Unsqueeze (group, zero)
    width_column = Unsqueeze (width, zero)
    blocks_column = Unsqueeze (blocks, zero)
    by_group = Concat <axis: int = 0> (keep, kv_head_column, group_column, width_column)
    by_row = Concat <axis: int = 0> (keep, column, last, width_column)
    query_rotated = RotaryEmbedding <num_heads: int = @heads, rotary_embedding_dim: int = @rotary_dim>
        (query, cos, sin, positions)
    query_exact = Cast <to: int = 1> (query_rotated)
    query_split = Reshape (query_exact, by_group)
    query_of_heads = Transpose <perm: ints = [0, 2, 1, 3, 4]> (query_split)
    rows = Reshape (query_of_heads, by_row)
    positions_column = Unsqueeze (positions, last)
    to_group = Concat <axis: int = 0> (column, column, group_column)
    positions_of_heads = Expand (positions_column, to_group)
    flat = Concat <axis: int = 0> (keep_one, last)
    row_positions = Reshape (positions_of_heads, flat)
"""

_SPLIT_ATTEND = """
    factor = Constant <value_float: float = @scale> ()
    keys_turned = Transpose <perm: ints = [0, 1, 2, 4, 3]> (keys)
    products = MatMul (rows, keys_turned)
    scores = Mul (products, factor)
    key_axes = Constant <value_ints: ints = [1, 3]> ()
    row_axes = Constant <value_ints: ints = [1, 2, 4]> ()
    key_index = Unsqueeze (index, key_axes)
    key_inside = Unsqueeze (inside, key_axes)
    row_index = Unsqueeze (row_positions, row_axes)
    before = LessOrEqual (key_index, row_index)
    visible = And (before, key_inside)
    seen_scores = Where (visible, scores, lowest)
    greatest = ReduceMax <keepdims: int = 1> (seen_scores, last)
    lowered = Sub (seen_scores, greatest)
    weights = Exp (lowered)
    summed = ReduceSum <keepdims: int = 1> (weights, last)
    weighted = MatMul (weights, values)
    by_token = Concat <axis: int = 0> (keep_three, sequence_column, group_column, last)
    by_head = Concat <axis: int = 0> (keep_one, head_column, sequence_column, blocks_column)
    by_head_and_channel = Concat <axis: int = 0> (by_head, last)
    greatest_split = Reshape (greatest, by_token)
    greatest_turned = Transpose <perm: ints = [0, 1, 4, 3, 2, 5]> (greatest_split)
    maxima = Reshape (greatest_turned, by_head)
    summed_split = Reshape (summed, by_token)
    summed_turned = Transpose <perm: ints = [0, 1, 4, 3, 2, 5]> (summed_split)
    sums = Reshape (summed_turned, by_head)
    weighted_split = Reshape (weighted, by_token)
    weighted_turned = Transpose <perm: ints = [0, 1, 4, 3, 2, 5]> (weighted_split)
    contexts = Reshape (weighted_turned, by_head_and_channel)
"""

_MERGE = """
    each_column = Unsqueeze (keys_each, column)
    last_seen = Div (positions, each_column)
    last_seen_column = Unsqueeze (last_seen, last)
    seen_blocks = LessOrEqual (block_numbers, last_seen_column)
    read = Unsqueeze (seen_blocks, column)
    read_channels = Unsqueeze (read, last)
    maxima_read = Where (read, maxima, lowest)
    sums_read = Where (read, sums, nothing)
    contexts_read = Where (read_channels, contexts, nothing)
    greatest = ReduceMax <keepdims: int = 1> (maxima_read, last)
    lowered = Sub (maxima_read, greatest)
    weights = Exp (lowered)
    weights_channels = Unsqueeze (weights, last)
    block_axis = Constant <value_ints: ints = [3]> ()
    weighted_sums = Mul (weights, sums_read)
    total = ReduceSum <keepdims: int = 1> (weighted_sums, last)
    weighted = Mul (weights_channels, contexts_read)
    summed = ReduceSum <keepdims: int = 0> (weighted, block_axis)
    merged = Div (summed, total)
    merged_turned = Transpose <perm: ints = [0, 2, 1, 3]> (merged)
    flatten = Constant <value_ints: ints = [0, 0, -1]> ()
    merged_flat = Reshape (merged_turned, flatten)
    context = Cast <to: int = @to> (merged_flat)
"""

_MERGE_SIZES = """
    sequence_column = Shape <start: int = 2, end: int = 3> (maxima)
    sequence = Squeeze (sequence_column)
    blocks_column = Shape <start: int = 3, end: int = 4> (maxima)
    blocks = Squeeze (blocks_column)
"""


def blocks_of(sequence: int, capacity: int) -> int:
    """Into how many blocks the keys of each row are divided: the last dimension of `maxima` and `sums`."""
    return max(1, min(_granules(capacity), MOST_BLOCKS // sequence))


def keys_each(length: int, blocks: int) -> int:
    """How many keys each block of a row of `length` keys has; the row's last ones may be shorter, or empty."""
    return -(-_granules(length) // blocks) * GRANULE


def _granules(keys: int) -> int:
    return -(-keys // GRANULE)


def partial_shapes(batch: int, sequence: int, heads: int, head_dim: int, capacity: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of `maxima`, `sums` and `contexts`, each float32."""
    rows = (batch, heads, sequence, blocks_of(sequence, capacity))
    return rows, rows, (*rows, head_dim)


def split_attention_function() -> ir.Function:
    """`SplitAttention` as an ONNX function of opset 24; what is undefined is finite in it."""
    signature = (
        f"{SPLIT_ATTENTION} <heads, kv_heads, head_dim, rotary_dim, scale> "
        "(query, cos, sin, key_cache, value_cache, lengths) => (maxima, sums, contexts)"
    )
    return onnx_function(signature, _SPLIT_SIZES + _LENGTHS + _SPLIT_KEYS + _SPLIT_QUERIES + _SPLIT_ATTEND)


def merge_attention_function() -> ir.Function:
    """`MergeAttention` as an ONNX function of opset 24."""
    signature = f"{MERGE_ATTENTION} <to> (maxima, sums, contexts, lengths) => (context)"
    return onnx_function(signature, _MERGE_SIZES + _LENGTHS + _MERGE)
