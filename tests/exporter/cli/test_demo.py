from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from exporter import embedded
from exporter.embedded import embedded_checkpoint
from runtime.manifest import Graph, Manifest, Source


def manifest(name: str) -> Manifest:
    return Manifest(
        tool="t", created="c", source=Source(name=name, fingerprint="f"), task="text-generation",
        target="onnxruntime", precision="fp32", opset=21, max_length=8, graph=Graph(inputs=(), outputs=()),
    )  # fmt: skip


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch, model: Any) -> list[Any]:
    """Stands for `exporter.export`: writes a manifest and notes what it was asked for."""
    asked: list[Any] = []

    def export(checkpoint: Path, bundle: Path, options: Any, progress: Any) -> Any:
        asked.append((checkpoint, bundle, options))
        bundle.mkdir(exist_ok=True)
        manifest(checkpoint.name).save(bundle)
        progress("trace", 0, 1)
        return SimpleNamespace(bundle=bundle, seconds={"trace": 1.0}, peak_rss_mb=1.0, manifest=manifest("tiny"))

    module = ModuleType("exporter.export")
    module.export = export  # type: ignore[attr-defined]
    module.ExportOptions = lambda **options: options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exporter.export", module)
    model.answers = [[" a family", " of planets."], [" a family", " of planets."]]
    return asked


def test_the_demo_exports_the_embedded_checkpoint_and_lets_it_speak(cli, exporter, model):
    outcome = cli("demo")
    assert outcome.code == 0
    assert "Complete the paragraph: our solar system is a family of planets.\n" in outcome.out
    assert exporter[0][0] == embedded_checkpoint()
    assert model.loaded["path"] == exporter[0][1]
    assert model.options["greedy"] is True


def test_nothing_is_left_behind_unless_a_place_is_given(cli, exporter, tmp_path):
    cli("demo")
    assert not exporter[0][1].parent.exists()
    outcome = cli("demo", tmp_path / "kept")
    assert (tmp_path / "kept" / "manifest.json").is_file()
    assert f"nemotron-export chat {tmp_path / 'kept'}" in outcome.out


def test_a_bundle_that_is_there_is_replaced_only_when_asked(cli, exporter, tmp_path):
    cli("demo", tmp_path / "kept")
    cli("demo", tmp_path / "kept", "--force")
    assert [options["force"] for _, _, options in exporter] == [False, True]


def test_an_installed_package_brings_its_own_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "exporter" / "embedded.py"))
    for place in (tmp_path / "artifacts", tmp_path / "exporter" / "data"):
        (place / "tiny-nemotron").mkdir(parents=True)
        (place / "tiny-nemotron" / "config.json").touch()
        assert embedded_checkpoint() == place / "tiny-nemotron"


def test_an_installation_without_the_checkpoint_says_so(cli, exporter, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "__file__", str(tmp_path / "exporter" / "embedded.py"))
    outcome = cli("demo")
    assert outcome.code == 2
    assert "install nemotron-export again" in outcome.err


@pytest.mark.slow
def test_the_whole_demo_twice_in_one_place(process, tmp_path):
    for options in ([], ["--force"]):
        outcome: subprocess.CompletedProcess[str] = process("demo", tmp_path / "kept", *options)
        assert outcome.returncode == 0, outcome.stderr
        assert "our solar system is the " in outcome.stdout
        assert "Warning" not in outcome.stderr
