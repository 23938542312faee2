"""Traces are the slow part of these tests: each structure is traced once, and tests get copies."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from checkpoints import SMALL, write_checkpoint

from exporter.spec import NemotronSpec, spec_from_config

Traced = Callable[..., tuple[NemotronSpec, ir.Model]]


@pytest.fixture(scope="session")
def traced() -> Traced:
    """`traced(**config)`: the spec and a fresh copy of the trace of SMALL with these values over it."""
    from exporter.trace import trace

    done: dict[str, tuple[NemotronSpec, ir.Model]] = {}

    def copy(**config: Any) -> tuple[NemotronSpec, ir.Model]:
        key = repr(sorted(config.items()))
        if key not in done:
            spec = spec_from_config({"model_type": "nemotron", **SMALL, **config}, "test")
            done[key] = (spec, trace(spec))
        spec, model = done[key]
        return spec, model.clone()

    return copy


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random fp32 checkpoint of the configuration SMALL. Tests must not write into it: `small_copy` is a copy."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "small")


@pytest.fixture
def small_copy(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may break."""
    return Path(shutil.copytree(small_checkpoint, tmp_path / "small"))


@pytest.fixture
def quick(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of small checkpoints take a copy of a trace that was made once."""

    def trace(spec: NemotronSpec, task: Any, *, cached: bool) -> Any:
        assert (task.name, cached) == ("text-generation", True)
        tied: dict[str, Any] = {"tie_word_embeddings": True} if spec.tied else {}
        known, model = traced(**tied)
        assert known == spec
        return model

    monkeypatch.setattr("exporter.export.trace", trace)


@pytest.fixture
def untraced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused late, after minutes of a large model's trace, fails the test."""

    def trace(spec: NemotronSpec, task: Any, *, cached: bool) -> None:
        raise AssertionError("the trace was begun")

    monkeypatch.setattr("exporter.export.trace", trace)


@pytest.fixture
def old(small_checkpoint: Path, tmp_path: Path, quick: None) -> Path:
    """A bundle, not gated, that stands where the next one shall go."""
    from exporter.export import ExportOptions, export

    return export(small_checkpoint, tmp_path / "place" / "bundle", ExportOptions(verify=False)).bundle
