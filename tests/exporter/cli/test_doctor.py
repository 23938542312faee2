from __future__ import annotations

import json
import sys
import time
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from exporter.cli import _requirements

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
    installed["tensorrt-rtx"] = "1.7.1.116"
    report = json.loads(cli("doctor", "--json").out)
    assert (report["packages"]["tensorrt-rtx"], report["packages"]["tensorrt"]) == ("1.7.1.116", None)
    assert report["missing"] == []


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
