"""The grid of an int8 key/value cache: a number is its integer, −128 … 127, times the scale of its channel."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError

LEAST, MOST = -128, 127
_SCHEMA = 1

Array = NDArray[Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class CacheScales:
    """One scale for each channel of each head: `keys` and `values`, float32 [layers, kv_heads, head_dim], above 0.

    Keys are rotated when they are rounded.
    """

    keys: Floats
    values: Floats

    def quantized(self, layer: int, key: Array, value: Array) -> tuple[Array, Array]:
        """The nearest points of the grid, int8, of keys and values [..., kv_heads, tokens, head_dim]."""
        pairs = ((key, self.keys), (value, self.values))
        rounded = (np.rint(x / scales[layer][:, None]) for x, scales in pairs)
        first, second = (np.clip(steps, LEAST, MOST).astype(np.int8) for steps in rounded)
        return first, second

    def dequantized(self, layer: int, key: Array, value: Array) -> tuple[Floats, Floats]:
        """The numbers, float32, that integers [..., kv_heads, tokens, head_dim] stand for."""
        first, second = (
            x.astype(np.float32) * scales[layer][:, None] for x, scales in ((key, self.keys), (value, self.values))
        )
        return first, second

    def save(self, path: Path) -> None:
        """Write them as a compressed npz."""
        np.savez_compressed(path, allow_pickle=False, schema=np.array(_SCHEMA), keys=self.keys, values=self.values)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read them.

        Raises:
            UserError: the file is damaged, or of another schema.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                schema, keys, values = int(arrays["schema"]), arrays["keys"], arrays["values"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} holds no scales of a cache ({error}); copy or export the bundle again") from error
        sound = keys.ndim == 3 and keys.shape == values.shape and bool((keys > 0).all() and (values > 0).all())
        if schema != _SCHEMA or not sound:
            raise UserError(
                f"{path} has schema {schema} and shapes {keys.shape} and {values.shape}, or a scale that is not above "
                "0; export the bundle again"
            )
        return cls(keys.astype(np.float32), values.astype(np.float32))
