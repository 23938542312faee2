"""Inputs of SplitAttention over a written cache, and what a softmax over the keys of each query gives for them."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes  # noqa: F401 - numpy knows bfloat16 by name from here on
import numpy as np
from numpy.typing import DTypeLike


@dataclass(frozen=True)
class Case:
    """A step: heads, widths, and how many keys each row has with the step's own."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    lengths: tuple[int, ...]
    sequence: int
    capacity: int
    seed: int = 0
    queries: float = 1.0  # how great they are
    told: tuple[int, ...] = ()  # other lengths than the true ones

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def inputs(self, dtype: DTypeLike = np.float32) -> tuple[np.ndarray, ...]:
        """query, cos, sin, key_cache, value_cache, lengths; NaN in the cache where no key is written."""
        random, batch = np.random.default_rng(self.seed), len(self.lengths)
        query = random.standard_normal((batch, self.sequence, self.heads * self.head_dim), np.float32) * self.queries
        angles = np.outer(np.arange(self.capacity), 10000.0 ** -(np.arange(0, self.rotary_dim, 2) / self.rotary_dim))
        caches = random.standard_normal((2, batch, self.kv_heads, self.capacity, self.head_dim), np.float32)
        for row, length in enumerate(self.lengths):
            caches[:, row, :, length:] = np.nan
        floats = (query, np.cos(angles), np.sin(angles), *caches)
        return *(x.astype(dtype) for x in floats), np.array(self.told or self.lengths, np.int32)

    def expected(self, dtype: DTypeLike = np.float32) -> np.ndarray:
        """The context in float64, query by query, from inputs of `dtype` and a rotated query rounded to it."""
        query, cos, sin, keys, values = (x.astype(np.float64) for x in self.inputs(dtype)[:5])
        half, group = self.rotary_dim // 2, self.heads // self.kv_heads
        context = np.empty((len(self.lengths), self.sequence, self.heads, self.head_dim))
        for row, length in enumerate(self.lengths):
            for token in range(self.sequence):
                position = length - self.sequence + token
                for head in range(self.heads):
                    q = query[row, token].reshape(self.heads, -1)[head].copy()
                    pair = q[:half] + 1j * q[half : 2 * half]
                    turned = pair * (cos[position] + 1j * sin[position])
                    q[:half], q[half : 2 * half] = turned.real, turned.imag
                    seen = slice(0, position + 1)
                    scores = keys[row, head // group, seen] @ q.astype(np.float32).astype(dtype).astype(np.float64)
                    weights = np.exp((scores - scores.max()) * self.scale)
                    context[row, token, head] = weights @ values[row, head // group, seen] / weights.sum()
        return context.reshape(*context.shape[:2], -1)
