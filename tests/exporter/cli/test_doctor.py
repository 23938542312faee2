from __future__ import annotations

import json
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from fake_libcuda import L4, play_driver
from fake_tensorrt import FakeCuda, FakeTensorRT
from forward_bundles import Toy

from exporter.cli import _requirements
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.forward import open_forward
from runtime.session import open_session

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages that are installed, as the doctor sees them."""
    everything = {*_requirements.BASE, *_requirements.EXTRAS["export"], "onnxruntime"}
    versions = dict.fromkeys(everything, "9.9")
    monkeypatch.setattr("exporter.cli.doctor._version", versions.get)
    return versions


def test_a_whole_installation_misses_nothing(cli, installed):
    outcome = cli("doctor")
    assert outcome.code == 0
    assert "nothing is missing" in outcome.out
    assert "CPUExecutionProvider" in outcome.out


def test_json_lists_packages_providers_and_what_is_missing(cli, installed):
    del installed["torch"]
    report = json.loads(cli("doctor", "--json").out)
    assert report["schema"] == 1
    assert report["python"] == sys.version.split()[0]
    assert (report["packages"]["numpy"], report["packages"]["torch"]) == ("9.9", None)
    assert "CPUExecutionProvider" in report["onnxruntime_providers"]
    assert report["missing"][0]["packages"] == ["torch"]
    assert report["missing"][0]["install"] == "pip install 'nemotron-export[export]'"


def test_tensorrt_is_shown_and_not_missed(cli, installed):
    installed |= {"tensorrt-rtx": "1.7.1.116", "cuda-python": "13.0"}
    report = json.loads(cli("doctor", "--json").out)
    assert (report["packages"]["tensorrt-rtx"], report["packages"]["tensorrt"]) == ("1.7.1.116", None)
    assert report["missing"] == []


def test_who_has_a_tensorrt_misses_what_runs_its_engines(cli, installed):
    installed["tensorrt"] = "11.4.0.1"
    (missing,) = json.loads(cli("doctor", "--json").out)["missing"]
    assert (missing["part"], missing["packages"]) == ("tensorrt", ["cuda-python"])
    assert missing["install"] == "pip install --upgrade 'nemotron-export[tensorrt]'"


def test_each_tensorrt_is_imported_and_one_that_cannot_be_says_what_adds_it(cli, installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(FakeCuda()))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", FakeTensorRT(FakeCuda(), version="1.3.0"))
    full, rtx = json.loads(cli("doctor", "--json").out)["tensorrt"]
    assert full == {"flavor": "tensorrt", "version": "11.4.0.1", "usable": True, "why": None}
    assert (rtx["flavor"], rtx["usable"]) == ("tensorrt-rtx", False)
    assert (
        "1.3.0 is too old, 1.7 is the oldest that will do; pip install --upgrade 'nemotron-export[rtx]'" in rtx["why"]
    )
    assert "11.4.0.1, can be imported" in cli("doctor").out
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "tensorrt is not installed; pip install --upgrade 'nemotron-export[tensorrt]'" in cli("doctor").out


def test_gpu_driver_and_toolkit_are_told(cli, installed, monkeypatch, tmp_path):
    play_driver(monkeypatch, L4)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "version.json").write_text('{"cuda": {"name": "CUDA SDK", "version": "13.0.1"}}')
    cuda = json.loads(cli("doctor", "--json").out)["cuda"]
    assert cuda["gpus"] == [{"name": "Fake L4", "compute_capability": "8.9"}]
    assert (cuda["cuda"], cuda["toolkit"]) == ("13.0", "13.0.1")
    out = cli("doctor").out
    for words in ("Fake L4, compute capability 8.9", "runs CUDA 13.0", "13.0.1"):
        assert words in out


def test_a_machine_without_a_gpu_says_so(cli, installed, monkeypatch):
    monkeypatch.setattr("runtime.driver._library", lambda: None)
    assert json.loads(cli("doctor", "--json").out)["cuda"]["gpus"] == []
    assert "none is visible" in cli("doctor").out


def test_a_gpu_that_onnxruntime_cannot_use_is_worth_another_package(cli, installed, monkeypatch):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    play_driver(monkeypatch, L4)
    (missing,) = json.loads(cli("doctor", "--json").out)["missing"]
    assert missing["packages"] == ["onnxruntime-gpu"]
    assert missing["install"] == "pip uninstall -y onnxruntime && pip install 'nemotron-export[gpu]'"


def verdicts(cli, directory: Path) -> dict[str, dict[str, str | None]]:
    """Of each bundle, by name, why each backend does not run it; None where it does."""
    found = json.loads(cli("doctor", directory, "--json").out)["bundles"]
    return {Path(one["path"]).name: {run["backend"]: run["why"] for run in one["runs"]} for one in found}


@pytest.mark.slow
def test_what_doctor_says_of_a_bundle_is_what_opening_it_does(
    cli, installed, gpu_host, tiny_bundle, tensorrt_bundle_of, int8_cache_bundle, tmp_path, monkeypatch
):
    """Each verdict is held against the session itself: it opens, or refuses in these words."""
    play_driver(monkeypatch)
    gpu_host.add_engine()
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    Toy("text-classification").write(shelf / "toy")
    bundles = (gpu_host.path, tiny_bundle, int8_cache_bundle, tensorrt_bundle_of("fp16"), tensorrt_bundle_of("bf16"))
    for path in bundles:
        (shelf / path.name).symlink_to(path)
    found = verdicts(cli, shelf)
    assert len(found) == 6
    for name, verdict in found.items():
        for backend, why in verdict.items():
            asked, _, device = backend.partition("-") if backend.startswith("onnxruntime") else (backend, "", None)
            opened = open_forward if name == "toy" else open_session
            try:
                opened(Bundle.open(shelf / name), backend=asked, device=device)
                refusal = None
            except UserError as error:
                refusal = str(error)
            assert why == refusal, (name, backend)
    assert found["bundle"] == {**found["bundle"], "onnxruntime-cpu": None, "tensorrt": None}
    assert "run nemotron-export build" in found["bundle"]["tensorrt-rtx"]
    assert "export it with --target tensorrt" in found["tiny"]["tensorrt"]
    assert "--precision fp16 or fp32" in found["tiny-tensorrt-bf16"]["onnxruntime-cpu"]


def test_nothing_is_loaded_to_tell_what_runs(cli, installed, gpu_host, monkeypatch):
    monkeypatch.setattr("onnxruntime.InferenceSession", None)
    gpu_host.add_engine(plan=b"no plan")
    found = verdicts(cli, gpu_host.path)["bundle"]
    assert found["onnxruntime-cpu"] is None
    assert found["tensorrt"] is None


def test_a_gpu_runs_a_bundle_of_16_bit_and_says_what_an_engine_lacks(
    cli, installed, gpu_host, tensorrt_bundle, monkeypatch
):
    play_driver(monkeypatch, L4)
    monkeypatch.setattr(
        "onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    assert verdicts(cli, tensorrt_bundle)[tensorrt_bundle.name]["onnxruntime-cuda"] is None
    gpu_host.add_engine(capabilities=("9.0",))
    why = verdicts(cli, gpu_host.path)["bundle"]["tensorrt"]
    assert "is for compute capability 9.0, this GPU (Fake L4) has 8.9; run nemotron-export build" in why


def test_a_broken_bundle_is_a_line_of_its_own(cli, installed, tiny_bundle, tmp_path):
    (tmp_path / "good").symlink_to(tiny_bundle)
    for name, text in (("future", '{"schema": 9}'), ("torn", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    (tmp_path / "no bundle").mkdir()
    report = json.loads(cli("doctor", tmp_path, "--json").out)["bundles"]
    assert [Path(one["path"]).name for one in report] == ["future", "good", "torn"]
    assert "has schema 9, this version reads 1" in report[0]["error"]
    assert "is not JSON" in report[2]["error"]
    outcome = cli("doctor", tmp_path)
    assert outcome.code == 0
    assert "cannot be opened: " in outcome.out
    assert "onnxruntime-cpu   yes" in outcome.out
    assert "no: is for onnxruntime; export it with --target tensorrt" in outcome.out


def test_a_place_without_bundles_is_told_and_one_that_is_not_there_refused(cli, installed, tmp_path):
    assert (
        f"{tmp_path} holds no bundles; nemotron-export export CHECKPOINT BUNDLE writes one"
        in cli("doctor", tmp_path).out
    )
    (tmp_path / "file").write_text("")
    for place, words in ((tmp_path / "nowhere", "does not exist"), (tmp_path / "file", "is not a directory")):
        outcome = cli("doctor", place)
        assert (outcome.code, outcome.out) == (2, "")
        assert f"error: {place} {words}; give " in outcome.err
        assert outcome.err.count("\n") == 1


def test_without_a_directory_it_looks_where_exports_go(cli, installed, tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert json.loads(cli("doctor", "--json").out)["bundles"] == []
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "mine").symlink_to(tiny_bundle)
    assert [one["path"] for one in json.loads(cli("doctor", "--json").out)["bundles"]] == ["artifacts/mine"]


def test_a_machine_without_a_runtime_is_offered_both(cli, installed):
    del installed["onnxruntime"]
    out = cli("doctor").out
    assert "missing: onnxruntime" in out
    assert "'nemotron-export[cpu]'" in out
    assert "'nemotron-export[gpu]'" in out


def test_the_gpu_runtime_is_as_good_as_the_other(cli, installed):
    installed["onnxruntime-gpu"] = installed.pop("onnxruntime")
    assert "nothing is missing" in cli("doctor").out


def test_two_runtimes_over_each_other_draw_a_warning(cli, installed):
    installed["onnxruntime-gpu"] = "9.9"
    report = json.loads(cli("doctor", "--json").out)
    assert "overwrite each other" in report["warnings"][0]
    assert "warning: onnxruntime and onnxruntime-gpu are both installed" in cli("doctor").out


@pytest.mark.parametrize("module", [None, ModuleType("onnxruntime")])
def test_a_runtime_that_cannot_be_imported_draws_a_warning(cli, installed, monkeypatch, module):
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    report = json.loads(cli("doctor", "--json").out)
    assert report["onnxruntime_providers"] == []
    assert "cannot be imported" in report["warnings"][0]


def test_it_answers_within_two_seconds(process):
    def seconds() -> float:
        started = time.perf_counter()
        assert process("doctor").returncode == 0
        return time.perf_counter() - started

    assert min(seconds() for _ in range(3)) < 2


def test_the_parts_are_those_of_the_project():
    project = tomllib.loads(PYPROJECT.read_text())["project"]

    def names(requirements: list[str]) -> tuple[str, ...]:
        return tuple(requirement.partition(">=")[0] for requirement in requirements)

    assert names(project["dependencies"]) == _requirements.BASE
    for extra, packages in _requirements.EXTRAS.items():
        assert names(project["optional-dependencies"][extra]) == packages
