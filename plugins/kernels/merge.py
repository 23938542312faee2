"""The kernel of `nemotron::MergeAttention`: one query head's context out of what its blocks of keys gave."""

from __future__ import annotations

import triton
import triton.language as tl

from plugins.kernels.split import LOG2_E, LOWEST, keys_each_of


@triton.jit(do_not_specialize=["sequence", "blocks"])  # as it is ahead of time
def merge_attention(
    maxima,
    sums,
    contexts,
    lengths,
    sequence,
    blocks,
    context,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GRANULE: tl.constexpr,
    CHANNELS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """One query head; at (token · HEADS + head, row) of the grid. It reads the blocks that the query sees, no others.

    CHANNELS is HEAD_DIM, or the next power of two.
    """
    token, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    row = tl.program_id(1).to(tl.int64)
    length = tl.maximum(tl.load(lengths + row), sequence)
    keys_each = keys_each_of(length, blocks, GRANULE)
    seen = tl.minimum((length - sequence + token) // keys_each + 1, blocks)

    base = ((row * HEADS + head) * sequence + token) * blocks
    channel = tl.arange(0, CHANNELS)
    is_channel = (channel < HEAD_DIM)[None, :]
    highest = tl.full([1], LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    merged = tl.zeros([CHANNELS], tl.float32)
    for start in tl.range(0, seen, AT_ONCE):
        block = start + tl.arange(0, AT_ONCE)
        there = block < seen
        each = tl.load(maxima + base + block, mask=there, other=LOWEST) * LOG2_E
        raised = tl.maximum(highest, tl.max(each, 0))
        weights, kept = tl.exp2(each - raised), tl.exp2(highest - raised)
        total = total * kept + tl.sum(weights * tl.load(sums + base + block, mask=there, other=0.0), 0)
        at = (base + block)[:, None] * HEAD_DIM + channel[None, :]
        part = tl.load(contexts + at, mask=there[:, None] & is_channel, other=0.0)
        merged = merged * kept + tl.sum(part * weights[:, None], 0)
        highest = raised
    place = ((row * sequence + token) * HEADS + head) * HEAD_DIM + channel
    tl.store(context + place, (merged / total).to(context.dtype.element_ty), mask=channel < HEAD_DIM)
