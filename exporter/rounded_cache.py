"""A cache on a grid of int8, as numbers: transformers' own with that rounding, and a bundle's read in its scales.

Where a number lies within `TIE` of the middle between two points of the grid, two right computations may round it to
either, and all that reads it differs by that step. transformers' cache then takes the point that the bundle took, so
that everything else can be held to the limits of the activations; any other difference of a step stands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from exporter.scaling import Scaling
from runtime.bundle import Bundle
from runtime.cache_scales import LEAST, MOST, CacheScales
from runtime.errors import UserError
from runtime.manifest import KV_SCALES

if TYPE_CHECKING:
    from exporter.evaluate.session import Cache
    from exporter.reference import Row

TIE = 0.001  # of a step; two right computations in fp32 differ by about 1e-5 of one

Tensor = torch.Tensor


class CacheView:
    """A bundle's cache as the checkpoint's model has it: integers are numbers, and factors of values are taken out."""

    def __init__(self, bundle: Bundle, scaling: Scaling) -> None:
        self._stored = scales_of(bundle)
        factors = [scaling.of_values(layer) for layer in range(bundle.cache_geometry.layers)]
        self._factors = [None if factor is None else factor.numpy() for factor in factors]

    @property
    def scales(self) -> CacheScales | None:
        """Of the grid that the model's own keys and values lie on; None where there is none."""
        if self._stored is None:
            return None
        pairs = zip(self._stored.values, self._factors, strict=True)
        values = [scale if factor is None else scale * factor[:, 0] for scale, factor in pairs]
        return CacheScales(self._stored.keys, np.stack(values))

    def of(self, cache: Cache) -> Cache:
        """A session's cache through this view."""
        return _Viewed(cache, self._stored, self._factors)


class _Viewed:
    """A cache's keys and values as the model's numbers, float32; what is written is rounded."""

    def __init__(self, cache: Cache, scales: CacheScales | None, factors: list[NDArray[np.float32] | None]) -> None:
        self.layers, self._cache, self._scales, self._factors = cache.layers, cache, scales, factors

    def read(self, layer: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A layer's keys and values [slots, kv_heads, capacity, head_dim]."""
        key, value = self._cache.read(layer)
        if self._scales is not None:
            key, value = self._scales.dequantized(layer, key, value)
        factor = self._factors[layer]
        return key.astype(np.float32), value.astype(np.float32) * (1 if factor is None else factor)

    def write(self, layer: int, key: NDArray[Any], value: NDArray[Any]) -> None:
        """Fill one layer's keys and values, rounded to the nearest points of a grid."""
        factor = self._factors[layer]
        value = value if factor is None else value / factor
        if self._scales is not None:
            key, value = self._scales.quantized(layer, key, value)
        self._cache.write(layer, key, value)


def scales_of(bundle: Bundle) -> CacheScales | None:
    """The scales that a bundle's cache was calibrated to; None for a cache of the activations' dtype.

    They are read from a file of their own: the graph, which has them too, is what they are to check.

    Raises:
        UserError: they are missing, damaged, or of another model.
    """
    if bundle.manifest.kv_cache is None:
        return None
    scales, geometry = CacheScales.load(bundle.file(KV_SCALES)), bundle.cache_geometry
    shape = (geometry.layers, geometry.kv_heads, geometry.head_dim)
    if scales.keys.shape != shape:
        raise UserError(
            f"{bundle.file(KV_SCALES)} has scales {scales.keys.shape} for a cache of {shape}; export the bundle again"
        )
    return scales


class RoundedCache(DynamicCache):
    """transformers' cache; new keys and values are rounded to the grid, kept and read as numbers of it.

    Clipped to −128 … 127 steps; ties go to the even step, or as `Row` says.
    """

    def __init__(self, config: Any, scales: CacheScales, row: Row) -> None:
        super().__init__(config=config)
        self._scales, self._row = scales, row

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values [1, kv_heads, tokens, head_dim], rounded; give all of them."""
        kept = self._row.kept[layer_idx] if self._row.kept else (None, None)
        scales = (self._scales.keys[layer_idx], self._scales.values[layer_idx])
        key, value = (
            self._rounded(x, torch.from_numpy(scale)[:, None].double(), near)
            for x, scale, near in zip((key_states, value_states), scales, kept, strict=True)
        )
        return super().update(key, value, layer_idx, *args, **kwargs)

    def _rounded(self, x: Tensor, scale: Tensor, kept: NDArray[np.float32] | None) -> Tensor:
        steps = x.double() / scale
        nearest = steps.round()
        other = nearest + torch.where(steps > nearest, 1.0, -1.0)
        if kept is not None:
            other = (torch.from_numpy(kept).double() / scale).round()
        if kept is not None or self._row.ties_turned:
            nearest = torch.where((steps - other).abs() <= 0.5 + TIE, other, nearest)
        return (nearest.clamp(LEAST, MOST) * scale).to(x.dtype)
