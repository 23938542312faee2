"""transformers' cache on the grid: it takes the bundle's side of a near tie, and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import NemotronConfig

from exporter.reference import Row
from exporter.rounded_cache import TIE, RoundedCache
from runtime.cache_scales import CacheScales

SCALES = CacheScales(np.full((1, 1, 4), 0.5, np.float32), np.full((1, 1, 4), 0.25, np.float32))
INSIDE, OUTSIDE = TIE / 2, TIE * 2  # of a step


def cached(steps: list[float], **row: object) -> list[float]:
    """What becomes of keys of so many steps, in steps."""
    cache = RoundedCache(NemotronConfig(num_hidden_layers=1), SCALES, Row([0], **row))  # type: ignore[arg-type]
    key = torch.tensor(steps)[None, None, None] * 0.5
    keys, _ = cache.update(key, torch.zeros_like(key), 0)
    found: list[float] = (keys / 0.5).flatten().tolist()
    return found


def kept(steps: list[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    key = np.array(steps, np.float32)[None, None] * np.float32(0.5)
    return [(key, np.zeros_like(key))]


def test_without_a_bundle_a_key_is_the_nearest_step_even_where_it_ties_and_clipped() -> None:
    assert cached([0.5, 1.5, 200.0, -200.0]) == [0, 2, 127, -128]


def test_a_near_tie_goes_as_in_the_bundle() -> None:
    assert cached([0.5 - INSIDE, 1.5 + INSIDE, -2.5, 0.2], kept=kept([1, 1, -3, 0])) == [1, 1, -3, 0]


@pytest.mark.parametrize("other", [1, -1, 5])
def test_any_other_difference_stands(other: float) -> None:
    assert cached([0.5 - OUTSIDE, 0, 0, 0], kept=kept([other, 0, 0, 0])) == [0, 0, 0, 0]


def test_near_ties_can_be_turned_to_see_what_they_change() -> None:
    assert cached([0.5 - INSIDE, 0.5 + INSIDE, 0.5 - OUTSIDE, 127.5 - INSIDE], ties_turned=True) == [1, 0, 0, 127]
