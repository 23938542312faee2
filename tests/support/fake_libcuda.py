"""The driver's libcuda played in Python: the calls by which GPUs are found, as documented for the CUDA driver API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from runtime.cuda import Gpu

L4 = Gpu("Fake L4", "8.9")
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


class FakeLibcuda:
    """A driver of CUDA 13.0; without GPUs it does not start, as the real one."""

    def __init__(self, gpus: Sequence[Gpu]) -> None:
        self.gpus = gpus

    def cuDriverGetVersion(self, number: Any) -> int:  # noqa: N802 - the library's name
        number._obj.value = 13000
        return 0

    def cuInit(self, flags: int) -> int:  # noqa: N802
        assert flags == 0
        return 0 if self.gpus else NO_DEVICE

    def cuDeviceGetCount(self, number: Any) -> int:  # noqa: N802
        number._obj.value = len(self.gpus)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = self.gpus[device.value].name.encode()[: size - 1]
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: Any) -> int:  # noqa: N802
        major, minor = self.gpus[device.value].capability.split(".")
        number._obj.value = int({75: major, 76: minor}[attribute])
        return 0


def play_driver(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    """Put a driver with these GPUs into the real one's place."""
    monkeypatch.setattr("runtime.driver._library", lambda: FakeLibcuda(gpus))
