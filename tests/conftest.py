"""What all tests share: the trained checkpoint, a bundle of it, and a cache directory of each test's own."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_tensorrt import FakeCuda, FakeTensorRT
from gpu_machine import Machine

# Before torch loads OpenMP: threads that spin while they wait make tests many times slower where cores are busy.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub, not even for a name that looks like one of its own

TINY = Path(__file__).parents[1] / "artifacts" / "tiny-nemotron"


@pytest.fixture(autouse=True)
def _own_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test proves, no other may find remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """The trained checkpoint that the repository carries. Tests must not write into it."""
    return TINY


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint, exported and gated. Tests must not write into it: `tiny_bundle_copy` is a copy."""
    from exporter.export import ExportOptions, export

    return export(TINY, tmp_path_factory.mktemp("exported") / "tiny", ExportOptions()).bundle


@pytest.fixture(scope="session")
def int8_cache_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained checkpoint with a cache of int8, exported, gated and measured. Tests must not write into it."""
    from exporter.export import ExportOptions, export

    place = tmp_path_factory.mktemp("exported") / "tiny-int8-cache"
    return export(TINY, place, ExportOptions(kv_cache="int8")).bundle


@pytest.fixture(scope="session")
def tensorrt_bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tensorrt_bundle_of(precision)`: the trained checkpoint for TensorRT, not gated. Tests must not write into it."""
    from exporter.export import ExportOptions, export

    place = tmp_path_factory.mktemp("exported")

    def bundle(precision: str) -> Path:
        directory = place / f"tiny-tensorrt-{precision}"
        if not directory.exists():
            export(TINY, directory, ExportOptions(target="tensorrt", precision=precision, verify=False))
        return directory

    return bundle


@pytest.fixture(scope="session")
def tensorrt_bundle(tensorrt_bundle_of: Callable[[str], Path]) -> Path:
    """The trained checkpoint for TensorRT in fp16, not gated. Tests must not write into it."""
    return tensorrt_bundle_of("fp16")


@pytest.fixture
def tiny_bundle_copy(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle that a test may break."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))


@pytest.fixture
def gpu_host(tensorrt_bundle_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with a GPU, played by fakes, and a bundle of the trained checkpoint without an engine yet."""
    cuda = FakeCuda()
    trt = FakeTensorRT(cuda)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return Machine(cuda, trt, Path(shutil.copytree(tensorrt_bundle_of("fp32"), tmp_path / "bundle")))


@pytest.fixture
def machine(gpu_host: Machine) -> Machine:
    """The same with an engine for its GPU."""
    gpu_host.add_engine()
    return gpu_host
