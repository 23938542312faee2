"""What the NVIDIA driver says, asked directly: no package is needed, and none of CUDA's."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from runtime.cuda import Gpu

_LIBRARY = "libcuda.so.1"  # the driver's own: https://docs.nvidia.com/cuda/cuda-driver-api/
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
_NAME = 256  # bytes of a GPU's name, at the most


@dataclass(frozen=True)
class Driver:
    """The newest CUDA that the driver runs, as "13.0", and the GPUs that it shows this process."""

    cuda: str
    gpus: tuple[Gpu, ...]


def find_driver() -> Driver | None:
    """The driver with its GPUs, none of them where they are hidden or gone; None where there is no driver."""
    library = _library()
    if library is None:
        return None
    number = ctypes.c_int(0)
    library.cuDriverGetVersion(ctypes.byref(number))
    cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    count = ctypes.c_int(0)
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return Driver(cuda, ())
    return Driver(cuda, tuple(_gpu(library, index) for index in range(count.value)))


def _library() -> Any:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        return None


def _gpu(library: Any, index: int) -> Gpu:
    device, number = ctypes.c_int(0), ctypes.c_int(0)
    library.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(_NAME)
    library.cuDeviceGetName(name, _NAME, device)
    capability = []
    for attribute in (_MAJOR, _MINOR):
        library.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        capability.append(number.value)
    return Gpu(name.value.decode(errors="replace"), ".".join(map(str, capability)))
