"""The meaning of the fused ops in numpy: the oracle of lowerings and kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def rotate(x: Floats, cos: Floats, sin: Floats, positions: NDArray[np.int64]) -> Floats:
    """Rotate the first channels of each head by position, the rest unchanged.

    Rotary position embedding (Su et al., 2021, eq. 34) with the pairing of GPT-NeoX: channel i turns with channel
    i + rotary_dim/2.

    Args:
        x: [batch, heads, sequence, head_dim].
        cos: [max_position, rotary_dim/2]; sin likewise.
        positions: int64 [batch, sequence].
    """
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([first * c - second * s, second * c + first * s, rest], axis=-1)


def partial_rope_attention(
    query: Floats,
    key: Floats,
    value: Floats,
    cos: Floats,
    sin: Floats,
    past_key: Floats,
    past_value: Floats,
    write_indices: NDArray[np.int64],
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    position_ids: NDArray[np.int64] | None = None,
) -> tuple[Floats, Floats, Floats]:
    """Causal grouped-query attention over a cache, with partial rotary embedding; shapes as in `plugins.ops`.

    Returns:
        context [batch, sequence, heads·head_dim], present_key and present_value [batch, kv_heads, capacity, head_dim].

    Raises:
        ValueError: a row writes past the capacity.
    """
    sequence, capacity = query.shape[1], past_key.shape[2]
    positions = write_indices[:, None] + np.arange(sequence)
    if positions.max() >= capacity:
        raise ValueError(f"position {positions.max()} is past the capacity {capacity}")
    turns = positions if position_ids is None else position_ids
    q = rotate(_split(query, heads), cos, sin, turns)
    present_key, present_value = past_key.copy(), past_value.copy()
    for row, start in enumerate(write_indices):
        span = slice(start, start + sequence)
        rotated = rotate(_split(key, kv_heads), cos, sin, turns)
        present_key[row, :, span] = rotated[row]
        present_value[row, :, span] = _split(value, kv_heads)[row]
    visible = np.arange(capacity) <= positions[:, None, :, None]
    context, _ = _attend(q, present_key, present_value, visible, scale)
    return context, present_key, present_value


def partial_rope_self_attention(
    query: Floats,
    key: Floats,
    value: Floats,
    cos: Floats,
    sin: Floats,
    position_ids: NDArray[np.int64],
    attention_mask: NDArray[np.int64],
    *,
    heads: int,
    kv_heads: int,
    scale: float,
) -> tuple[Floats, Floats]:
    """Causal grouped-query attention of whole rows, with partial rotary embedding; shapes as in `plugins.ops`.

    Returns:
        context [batch, sequence, heads·head_dim] and weights [batch, heads, sequence, sequence].
    """
    sequence = query.shape[1]
    q = rotate(_split(query, heads), cos, sin, position_ids)
    k = rotate(_split(key, kv_heads), cos, sin, position_ids)
    seen = (attention_mask != 0)[:, None, None, :] | np.eye(sequence, dtype=bool)
    visible = np.tril(np.ones((sequence, sequence), bool)) & seen
    return _attend(q, k, _split(value, kv_heads), visible, scale)


def _split(x: Floats, count: int) -> Floats:
    """[batch, sequence, count·head_dim] as heads: [batch, count, sequence, head_dim]."""
    return x.reshape(*x.shape[:2], count, -1).transpose(0, 2, 1, 3)


def _attend(q: Floats, k: Floats, v: Floats, visible: NDArray[np.bool_], scale: float) -> tuple[Floats, Floats]:
    """Context, heads merged, and weights; each key/value head serves a group of query heads."""
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.where(visible, (q @ k.swapaxes(2, 3)) * scale, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    context = (weights @ v).transpose(0, 2, 1, 3)
    return context.reshape(*context.shape[:2], -1), weights
