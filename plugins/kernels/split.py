"""The kernel of `nemotron::SplitAttention`: attention of a tile of queries over one block of a row's keys.

A tile's rows are the query heads of one key/value head, for consecutive query tokens: row r is token r // GROUP, head
r % GROUP. So each key and value is loaded once for all heads that share it, in a prefill as in a step of one token.

A head whose width is no power of two (96, 192) is taken as two pieces that are, WIDTH and REST channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Below every score, and finite: a row that sees nothing of a block gives zeros and not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit(do_not_specialize=["sequence", "capacity"])  # as it is ahead of time
def split_attention(
    query,
    cos,
    sin,
    keys,
    values,
    lengths,
    sequence,
    capacity,
    maxima,
    sums,
    contexts,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    SCALE: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of one row over one block; at (key/value head · tiles + tile, block, row) of the grid.

    Pointers and integers in TensorRT's order: inputs, extra arguments, outputs. Shapes as in `plugins.split_attention`.
    """
    HEAD_DIM: tl.constexpr = WIDTH + REST
    HEADS: tl.constexpr = KV_HEADS * GROUP
    tiles = tl.num_programs(0) // KV_HEADS
    tile, kv_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    block, blocks, row = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)

    # TensorRT times kernels on lengths of its own making: whatever they say, nothing outside the cache is read.
    length = tl.minimum(tl.maximum(tl.load(lengths + row), sequence), capacity)
    keys_each = keys_each_of(length, blocks, GRANULE)
    first_token = tile * BLOCK_M // GROUP
    last_token = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, sequence - 1)
    past = length - sequence
    begin = block * keys_each
    end = tl.minimum(begin + keys_each, past + last_token + 1)
    if begin >= end:
        return

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = rows // GROUP, kv_head * GROUP + rows % GROUP
    real, position = token < sequence, past + token
    heads = query + ((row * sequence + token) * HEADS + head) * HEAD_DIM
    q = _rotated(heads, cos, sin, position, real, 0, WIDTH, ROTARY_DIM)
    q_rest = _rotated(heads, cos, sin, position, real, WIDTH, REST, ROTARY_DIM) if REST else q

    cache = (row * KV_HEADS + kv_head) * capacity * HEAD_DIM
    keys += cache
    values += cache
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    context = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    rest = tl.zeros([BLOCK_M, REST if REST else 1], tl.float32)
    # Tiles of keys that every row sees whole need no mask.
    seen_by_all = tl.maximum(tl.minimum(end, past + first_token + 1) - begin, 0)
    masked_from = begin + seen_by_all // BLOCK_N * BLOCK_N
    for start in tl.range(begin, masked_from, BLOCK_N):
        highest, total, context, rest = _attend(
            q,
            q_rest,
            keys,
            values,
            start,
            end,
            position,
            highest,
            total,
            context,
            rest,
            WIDTH,
            REST,
            SCALE,
            BLOCK_N,
            False,
        )
    for start in tl.range(masked_from, end, BLOCK_N):
        highest, total, context, rest = _attend(
            q,
            q_rest,
            keys,
            values,
            start,
            end,
            position,
            highest,
            total,
            context,
            rest,
            WIDTH,
            REST,
            SCALE,
            BLOCK_N,
            True,
        )

    place = ((row * HEADS + head) * sequence + token) * blocks + block
    tl.store(maxima + place, highest * LN_2, mask=real)
    tl.store(sums + place, total, mask=real)
    channels = tl.arange(0, WIDTH)
    tl.store(contexts + place[:, None] * HEAD_DIM + channels[None, :], context, mask=real[:, None])
    if REST:
        channels = WIDTH + tl.arange(0, REST)
        tl.store(contexts + place[:, None] * HEAD_DIM + channels[None, :], rest, mask=real[:, None])


@triton.jit
def keys_each_of(length, blocks, GRANULE: tl.constexpr):
    """`plugins.split_attention.keys_each`."""
    return tl.cdiv(tl.cdiv(length, GRANULE), blocks) * GRANULE


@triton.jit
def _rotated(heads, cos, sin, position, real, FIRST: tl.constexpr, COUNT: tl.constexpr, ROTARY_DIM: tl.constexpr):
    """COUNT channels of the queries from FIRST on, rotated in fp32 and rounded: [BLOCK_M, COUNT]."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    channel = FIRST + tl.arange(0, COUNT)
    x = tl.load(heads[:, None] + channel[None, :], mask=real[:, None], other=0.0)
    if FIRST >= ROTARY_DIM:
        return x
    turns = real[:, None] & (channel < ROTARY_DIM)[None, :]
    partner = tl.where(channel < HALF, channel + HALF, channel - HALF)
    y = tl.load(heads[:, None] + partner[None, :], mask=turns, other=0.0).to(tl.float32)
    angle = position[:, None] * HALF + (channel % HALF)[None, :]
    c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)
    return (x.to(tl.float32) * c + tl.where((channel < HALF)[None, :], -y, y) * s).to(x.dtype)


@triton.jit
def _attend(
    q,
    q_rest,
    keys,
    values,
    start,
    end,
    position,
    highest,
    total,
    context,
    rest,
    WIDTH: tl.constexpr,
    REST: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take BLOCK_N more keys into the running maximum, sum and context (online softmax, Milakov & Gimelshein, 2018)."""
    index = start + tl.arange(0, BLOCK_N)
    there = (index < end)[:, None]
    at = index[:, None] * (WIDTH + REST) + tl.arange(0, WIDTH)[None, :]
    scores = tl.dot(q, tl.trans(_loaded(keys + at, there, MASKED)), input_precision="ieee")
    if REST:
        at_rest = index[:, None] * (WIDTH + REST) + (WIDTH + tl.arange(0, REST))[None, :]
        scores = tl.dot(q_rest, tl.trans(_loaded(keys + at_rest, there, MASKED)), scores, input_precision="ieee")
    scores *= SCALE * LOG2_E
    if MASKED:
        scores = tl.where((index < end)[None, :] & (index[None, :] <= position[:, None]), scores, float("-inf"))
    raised = tl.maximum(highest, tl.max(scores, 1))
    weights = tl.exp2(scores - raised[:, None])
    kept = tl.exp2(highest - raised)
    total = total * kept + tl.sum(weights, 1)
    weights = weights.to(q.dtype)
    context = tl.dot(weights, _loaded(values + at, there, MASKED), context * kept[:, None], input_precision="ieee")
    if REST:
        v_rest = _loaded(values + at_rest, there, MASKED)
        rest = tl.dot(weights, v_rest, rest * kept[:, None], input_precision="ieee")
    return raised, total, context, rest


@triton.jit
def _loaded(pointers, there, MASKED: tl.constexpr):
    """A tile of the cache; where it is not written, zeros: what lies there may be NaN."""
    return tl.load(pointers, mask=there, other=0.0) if MASKED else tl.load(pointers)
