"""The meaning of `nemotron::PartialRopeAttention` in numpy: the oracle of lowerings and kernels."""

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
) -> tuple[Floats, Floats, Floats]:
    """Causal grouped-query attention over a cache, with partial rotary embedding; shapes as in `plugins.ops`.

    Returns:
        context [batch, sequence, heads·head_dim], present_key and present_value [batch, kv_heads, capacity, head_dim].

    Raises:
        ValueError: a row writes past the capacity.
    """
    batch, sequence, _ = query.shape
    capacity, head_dim = past_key.shape[2:]
    positions = write_indices[:, None] + np.arange(sequence)
    if positions.max() >= capacity:
        raise ValueError(f"position {positions.max()} is past the capacity {capacity}")

    def split(x: Floats, count: int) -> Floats:
        return x.reshape(batch, sequence, count, head_dim).transpose(0, 2, 1, 3)

    q = rotate(split(query, heads), cos, sin, positions)
    present_key, present_value = past_key.copy(), past_value.copy()
    for row, start in enumerate(write_indices):
        span = slice(start, start + sequence)
        rotated = rotate(split(key, kv_heads), cos, sin, positions)
        present_key[row, :, span] = rotated[row]
        present_value[row, :, span] = split(value, kv_heads)[row]

    group = heads // kv_heads
    k, v = np.repeat(present_key, group, axis=1), np.repeat(present_value, group, axis=1)
    scores = (q @ k.swapaxes(2, 3)) * scale
    visible = np.arange(capacity) <= positions[:, None, :, None]
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    context = (weights @ v).transpose(0, 2, 1, 3).reshape(batch, sequence, heads * head_dim)
    return context, present_key, present_value
