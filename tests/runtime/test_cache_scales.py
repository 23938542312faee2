from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime.cache_scales import CacheScales
from runtime.errors import UserError


def scales() -> CacheScales:
    random = np.random.default_rng(0)
    keys, values = (random.uniform(0.01, 0.1, (2, 3, 4)).astype(np.float32) for _ in range(2))
    return CacheScales(keys, values)


def test_what_is_cached_is_read_within_half_a_step() -> None:
    grid, random = scales(), np.random.default_rng(1)
    given = [random.uniform(-1, 1, (5, 3, 7, 4)).astype(np.float32) for _ in range(2)]
    integers = grid.quantized(1, *given)
    assert {array.dtype for array in integers} == {np.dtype(np.int8)}
    for x, found, steps in zip(given, grid.dequantized(1, *integers), (grid.keys, grid.values), strict=True):
        assert (np.abs(x - found) <= 0.5001 * steps[1][:, None]).all()


def test_what_passes_the_range_is_clipped_and_does_not_wrap() -> None:
    huge = np.full((1, 3, 1, 4), 1e3, np.float32)
    key, value = scales().quantized(0, huge, -huge)
    assert (key == 127).all()
    assert (value == -128).all()


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    scales().save(tmp_path / "scales.npz")
    found = CacheScales.load(tmp_path / "scales.npz")
    np.testing.assert_array_equal(found.keys, scales().keys)
    np.testing.assert_array_equal(found.values, scales().values)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"], ids=["empty", "cut off"])
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "scales.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"scales.npz holds no scales of a cache"):
        CacheScales.load(path)


def test_a_scale_of_zero_is_refused(tmp_path: Path) -> None:
    zero = np.zeros((1, 1, 4), np.float32)
    CacheScales(zero, zero).save(tmp_path / "scales.npz")
    with pytest.raises(UserError, match="not above 0"):
        CacheScales.load(tmp_path / "scales.npz")
