"""Which GPUs and which CUDA the driver tells of, on a fake of its library."""

from __future__ import annotations

import pytest
from fake_libcuda import L4, play_driver

from runtime import driver
from runtime.cuda import Gpu
from runtime.driver import Driver, find_driver


def test_every_visible_gpu_has_its_name_and_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Gpu("NVIDIA GeForce RTX 5090", "12.0")
    play_driver(monkeypatch, L4, other)
    assert find_driver() == Driver("13.0", (L4, other))


def test_a_driver_whose_gpus_are_hidden_still_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    play_driver(monkeypatch)
    assert find_driver() == Driver("13.0", ())


def test_a_machine_without_a_driver_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_LIBRARY", "libcuda-that-nobody-has.so.1")
    assert find_driver() is None
