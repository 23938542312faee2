"""Scales of an int8 cache, from the keys and values of a calibration text.

One scale for each channel of each head. The two channels that rotate together share one, from the largest length of
their pair: rotation turns a pair and keeps its length, so what the scale covers does not depend on how far into a row
the calibration went. The range of a single rotated channel does: in windows of 64 tokens, slow pairs have hardly
turned.
"""

from __future__ import annotations

import numpy as np
import torch

from exporter.calibration import LayerActivations
from runtime.cache_scales import MOST

# Beyond the largest magnitude of the calibration: another text goes further, and clipping costs more than a wider step.
HEADROOM = 1.1


def layer_scales(layer: LayerActivations, rotary_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """One layer's scales of keys and of values, float32 [kv_heads, head_dim]; 1 for a channel that is always 0.

    Args:
        layer: keys rotated, and values, [tokens, kv_heads, head_dim].
        rotary_dim: channels that rotate, the pairs half of them apart.
    """
    key, value = (_scale(x.abs().amax(0)) for x in (_pairs(layer.keys, rotary_dim), layer.values))
    return key, value


def _pairs(keys: torch.Tensor, rotary_dim: int) -> torch.Tensor:
    """Each rotated channel as the length of its pair, [tokens, kv_heads, head_dim]."""
    half = rotary_dim // 2
    lengths = torch.hypot(keys[..., :half], keys[..., half:rotary_dim])
    return torch.cat([lengths, lengths, keys[..., rotary_dim:]], -1)


def _scale(largest: torch.Tensor) -> np.ndarray:
    scale = largest.float() * (HEADROOM / MOST)
    found: np.ndarray = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones(()), scale).numpy()
    return found
