"""Scales cover what the calibration text showed, wherever in a row it comes again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache, NemotronForCausalLM

from exporter.calibration import Calibration, LayerActivations
from exporter.checkpoint import Checkpoint
from exporter.kv_scales import HEADROOM, layer_scales
from runtime.cache_scales import CacheScales


def activations(keys: torch.Tensor, values: torch.Tensor | None = None) -> LayerActivations:
    return LayerActivations(0, None, {}, {}, keys, keys if values is None else values, {})


@pytest.fixture(scope="module")
def windows(tiny_checkpoint: Path) -> np.ndarray:
    return np.random.default_rng(0).integers(2048, size=(4, 32))


@pytest.fixture(scope="module")
def scales(tiny_checkpoint: Path, windows: np.ndarray) -> CacheScales:
    layers = Calibration(Checkpoint.open(tiny_checkpoint), windows).layers()
    keys, values = zip(*(layer_scales(layer, rotary_dim=32) for layer in layers), strict=True)
    return CacheScales(np.stack(keys), np.stack(values))


def cached(checkpoint: Path, windows: np.ndarray, positions: torch.Tensor | None = None) -> list[np.ndarray]:
    """What transformers caches: keys and values float32 [layers, kv_heads, windows · tokens, head_dim]."""
    model = NemotronForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.from_numpy(windows), position_ids=positions, past_key_values=cache, use_cache=True)
    halves = (
        [layer.keys for layer in cache.layers],
        [layer.values for layer in cache.layers],
    )
    return [torch.stack(half).transpose(1, 2).flatten(2, 3).numpy() for half in halves]


def test_values_have_the_range_that_transformers_gives_each_channel(
    scales: CacheScales, tiny_checkpoint: Path, windows: np.ndarray
) -> None:
    _, values = cached(tiny_checkpoint, windows)
    np.testing.assert_allclose(scales.values * 127 / HEADROOM, np.abs(values).max(2), rtol=1e-4)


def test_no_position_takes_a_key_of_the_text_beyond_its_scale(
    scales: CacheScales, tiny_checkpoint: Path, windows: np.ndarray
) -> None:
    far = torch.arange(32) + 400  # within the window they are as they were; every key has turned on
    keys, _ = cached(tiny_checkpoint, windows, far[None])
    assert (np.abs(keys).max(2) <= 127 * scales.keys).all()
    near, _ = cached(tiny_checkpoint, windows)
    assert (np.abs(keys).max(2) > HEADROOM * np.abs(near).max(2)).any()  # ranges of single channels would clip


def test_a_turning_pair_shares_the_scale_of_its_length_and_the_rest_have_their_own() -> None:
    keys = torch.tensor([[[3.0, 1.0, 4.0, 0.0, 2.0, 9.0]]])  # pairs 0 and 2, 1 and 3
    key, value = layer_scales(activations(keys, keys), rotary_dim=4)
    np.testing.assert_allclose(key[0] * 127 / HEADROOM, [5, 1, 5, 1, 2, 9], rtol=1e-6)
    np.testing.assert_allclose(value[0, [0, 1, 2, 4, 5]] * 127 / HEADROOM, [3, 1, 4, 2, 9], rtol=1e-6)


def test_a_channel_that_is_always_zero_stays_zero() -> None:
    key, _ = layer_scales(activations(torch.zeros(3, 1, 4)), rotary_dim=2)
    assert (key == 1).all()
