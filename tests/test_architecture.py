"""Imports go one way, plugins ← runtime ← exporter, so that what is deployed never needs what exports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors"}
FORBIDDEN = {
    "plugins": {"runtime", "exporter", "torch", "transformers"},
    "runtime": {"exporter", *HEAVY},
}


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            yield str(node.module)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_module_imports_against_the_flow(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    against = {
        (file.name, name) for file in files for name in imported(file) if name.partition(".")[0] in FORBIDDEN[package]
    }
    assert not against


def test_the_tests_run_our_modules_and_not_a_folder_of_the_same_name() -> None:
    import exporter
    import plugins
    import runtime

    for package in (exporter, plugins, runtime):
        assert Path(package.__file__ or "").parent == ROOT / package.__name__
    assert not list((ROOT / "tests").rglob("__init__.py"))
