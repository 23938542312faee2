from pathlib import Path

import pytest

from runtime import hardware


def test_the_same_gpu_with_another_driver_has_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_PROC", tmp_path)
    assert hardware.cuda_name() == "NVIDIA GPU, driver unknown"
    gpu = tmp_path / "driver/nvidia/gpus/0000:01:00.0"
    gpu.mkdir(parents=True)
    (gpu / "information").write_text("Model: \t\t NVIDIA L4\nIRQ:   33\n")
    version = tmp_path / "driver/nvidia/version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n")
    assert hardware.cuda_name() == "NVIDIA L4, driver 580.82.07"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  590.10  Tue Jan 1\n")
    assert hardware.cuda_name() == "NVIDIA L4, driver 590.10"


def test_where_the_system_does_not_tell_the_age_of_a_process_it_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < (hardware.process_age() or 0) < 36_000
    monkeypatch.setattr(hardware, "_PROC", tmp_path)
    assert hardware.process_age() is None


def test_a_processor_has_a_name_even_where_the_system_gives_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_PROC", tmp_path)
    assert hardware.cpu_name()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU 9\n")
    assert hardware.cpu_name().startswith("Some CPU 9 (")
