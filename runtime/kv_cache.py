"""The key/value cache of ONNX Runtime sessions: allocated once, updated in place by the graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import CacheGeometry
from runtime.errors import UserError

if TYPE_CHECKING:
    from onnxruntime import OrtValue

Array = NDArray[Any]
_DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


class KVCache:
    """Per layer one key and one value buffer [slots, kv_heads, capacity, head_dim], on the CPU or on a GPU.

    Slot `s` is contiguous and starts at `addresses(layer, s)`: a graph that runs slots s..s+n binds those.
    """

    def __init__(self, geometry: CacheGeometry, slots: int, capacity: int, device: str = "cpu") -> None:
        self.dtype = numpy_dtype(geometry.dtype)
        self.shape = (slots, geometry.kv_heads, capacity, geometry.head_dim)
        self.layers = geometry.layers
        self._device = device
        self._slot_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
        try:
            self._buffers = [(self._allocate(), self._allocate()) for _ in range(self.layers)]
        except MemoryError as error:
            size = 2 * self.layers * slots * self._slot_bytes / 2**30
            raise UserError(
                f"no memory for a cache of {slots} × {capacity} tokens ({size:.1f} GiB); "
                "ask for fewer tokens (--max-length) or a smaller batch"
            ) from error

    def addresses(self, layer: int, slot: int) -> tuple[int, int]:
        """Where the slot's keys and values of one layer start in memory, on the cache's device."""
        key, value = self._buffers[layer]
        return _address(key) + slot * self._slot_bytes, _address(value) + slot * self._slot_bytes

    def read(self, layer: int) -> tuple[Array, Array]:
        """A layer's keys and values [slots, kv_heads, capacity, head_dim]: views, or copies of a GPU's."""
        key, value = self._buffers[layer]
        return _read(key), _read(value)

    def copy_prefix(self, source: int, target: int, length: int) -> int:
        """Copy the first tokens of one slot to another; how many were copied: none of a GPU's."""
        for pair in self._buffers:
            for buffer in pair:
                if not isinstance(buffer, np.ndarray):
                    return 0
                buffer[target, :, :length] = buffer[source, :, :length]
        return length

    def exchange(self, one: int, other: int, length: int) -> bool:
        """Let two slots have each other's first tokens; whether they do: not on a GPU."""
        buffers = [buffer for pair in self._buffers for buffer in pair if isinstance(buffer, np.ndarray)]
        for buffer in buffers:
            buffer[[one, other], :, :length] = buffer[[other, one], :, :length]
        return bool(buffers)

    def write(self, layer: int, key: Array, value: Array) -> None:
        """Fill one layer's keys and values, each [slots, kv_heads, capacity, head_dim]."""
        for buffer, given in zip(self._buffers[layer], (key, value), strict=True):
            content = np.ascontiguousarray(given, self.dtype)
            if content.shape != self.shape:
                raise ValueError(f"expected {self.shape}, found {content.shape}")
            if isinstance(buffer, np.ndarray):
                buffer[...] = content
            else:
                buffer.update_inplace(content)

    def _allocate(self) -> Array | OrtValue:
        if self._device == "cpu":
            # The system zeroes pages when first touched: a large capacity costs only what is used of it.
            return np.zeros(self.shape, self.dtype)
        from onnxruntime import OrtValue

        buffer = OrtValue.ortvalue_from_shape_and_type(self.shape, self.dtype.type, self._device, 0)
        buffer.update_inplace(np.zeros(self.shape, self.dtype))
        return buffer


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a graph's tensor: floating point, or a rounded cache's.

    Raises:
        UserError: numpy, and ONNX Runtime's CPU kernels, have none of that name (bfloat16).
    """
    if name not in _DTYPES:
        raise UserError(
            f"{name} does not run on ONNX Runtime; build a TensorRT engine, or export with --precision fp16 or fp32 "
            "(or a --recipe with such activations)"
        )
    return np.dtype(_DTYPES[name])


def _address(buffer: Array | OrtValue) -> int:
    return buffer.ctypes.data if isinstance(buffer, np.ndarray) else int(buffer.data_ptr())


def _read(buffer: Array | OrtValue) -> Array:
    return buffer if isinstance(buffer, np.ndarray) else np.asarray(buffer.numpy())
