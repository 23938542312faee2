"""The meaning of SplitAttention and MergeAttention in numpy: the oracle of their function bodies and kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike, NDArray

from plugins.reference import Floats, rotate
from plugins.split_attention import blocks_of, keys_each, partial_shapes

Partials = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


def split_attention(
    query: Floats,
    cos: Floats,
    sin: Floats,
    key_cache: Floats,
    value_cache: Floats,
    lengths: NDArray[np.int32],
    *,
    heads: int,
    kv_heads: int,
    scale: float,
) -> Partials:
    """What each block of keys gives; shapes as in `plugins.split_attention`, what is undefined there is NaN.

    Inputs of 16 bit are multiplied and summed in fp32; the rotated query alone is rounded to their type.

    Raises:
        ValueError: a row has fewer keys than the step has queries, or more than the capacity.
    """
    batch, sequence, _ = query.shape
    capacity, width = key_cache.shape[2:]
    if lengths.min() < sequence or lengths.max() > capacity:
        raise ValueError(f"lengths {lengths} are not within {sequence} queries and the capacity {capacity}")
    positions = _positions(lengths, sequence)
    split = _exact(query).reshape(batch, sequence, heads, width).transpose(0, 2, 1, 3)
    rotated = _exact(rotate(split, _exact(cos), _exact(sin), positions).astype(query.dtype))
    group, blocks = heads // kv_heads, blocks_of(sequence, capacity)
    maxima, sums, contexts = (
        np.full(shape, np.nan, np.float32) for shape in partial_shapes(batch, sequence, heads, width, capacity)
    )
    for row, length in enumerate(lengths):
        each = keys_each(int(length), blocks)
        for block, begin in enumerate(range(0, int(length), each)):
            span = slice(begin, min(begin + each, int(length)))
            keys, values = (np.repeat(_exact(cache[row, :, span]), group, axis=0) for cache in (key_cache, value_cache))
            seen = np.arange(span.start, span.stop) <= positions[row, :, None]
            some = seen.any(1)
            scores = (rotated[row][:, some] @ keys.swapaxes(1, 2)) * np.float32(scale)
            scores = np.where(seen[some], scores, -np.inf)
            greatest = scores.max(-1)
            weights = np.exp(scores - greatest[..., None])
            maxima[row, :, some, block] = greatest.T
            sums[row, :, some, block] = weights.sum(-1).T
            contexts[row, :, some, block] = (weights @ values).swapaxes(0, 1)
    return maxima, sums, contexts


def merge_attention(
    maxima: NDArray[np.float32],
    sums: NDArray[np.float32],
    contexts: NDArray[np.float32],
    lengths: NDArray[np.int32],
    dtype: DTypeLike = np.float32,
) -> Floats:
    """The context [batch, sequence, heads·head_dim] of `dtype`, out of the blocks that each query sees."""
    batch, _, sequence, blocks = maxima.shape
    read = seen_blocks(lengths, sequence, blocks)[:, None]
    greatest = np.where(read, maxima, -np.inf).max(-1, keepdims=True)
    weights = np.exp(np.where(read, maxima, -np.inf) - greatest)
    total = (weights * np.where(read, sums, 0)).sum(-1)
    merged = (weights[..., None] * np.where(read[..., None], contexts, 0)).sum(3) / total[..., None]
    context: Floats = merged.transpose(0, 2, 1, 3).reshape(batch, sequence, -1).astype(dtype)
    return context


def seen_blocks(lengths: NDArray[np.int32], sequence: int, blocks: int) -> NDArray[np.bool_]:
    """bool [batch, sequence, blocks]: where a query sees a key of a block, and what the block gives is defined."""
    each = np.array([keys_each(int(length), blocks) for length in lengths])
    last = _positions(lengths, sequence) // each[:, None]
    seen: NDArray[np.bool_] = np.arange(blocks) <= last[..., None]
    return seen


def _positions(lengths: NDArray[np.int32], sequence: int) -> NDArray[np.int64]:
    """int64 [batch, sequence], of the step's queries."""
    positions: NDArray[np.int64] = lengths[:, None].astype(np.int64) - sequence + np.arange(sequence)
    return positions


def _exact(x: Floats) -> NDArray[np.float32]:
    return x.astype(np.float32)
