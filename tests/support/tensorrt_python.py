"""TensorRT's own Python without TensorRT: its bindings install from their wheel, and its libraries are stubs.

The stubs define what the bindings link against and return NULL, so whatever is C++ is not there: `tensorrt_builder.py`
asks in its place.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from environments import ROOT, environment, run

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip


def ask_plugins(version: str, question: dict[str, Any], place: Path) -> dict[str, Any]:
    """What `tensorrt_builder.py` answers with the bindings of a version.

    Args:
        version: of TensorRT 11.
        question: see there.
        place: an empty directory, for stubs and the answer.
    """
    bin_ = environment(f"tensorrt-{version}", [f"tensorrt-cu13-bindings=={version}"], constraints=None)
    (packages,) = bin_.parent.glob("lib/python*/site-packages")
    _front(place)
    _stubs(place)
    script = ROOT / "tests" / "support" / "tensorrt_builder.py"
    answer = place / "answer.json"
    said = run([sys.executable, script, packages, place, json.dumps(question), answer], timeout=300)
    assert said == "", "stdout is for a command's result"
    told: dict[str, Any] = json.loads(answer.read_text())
    return told


def _front(place: Path) -> None:
    """TensorRT's packages `tensorrt` and `tensorrt.plugin`, which name what is in its bindings."""
    for package, names in (("tensorrt", "*, __version__"), ("tensorrt.plugin", "*")):
        directory = place / package.replace(".", "/")
        directory.mkdir()
        source = "tensorrt_bindings" + package.removeprefix("tensorrt")
        lines = [f"from {source} import {name}\n" for name in names.split(", ")]
        (directory / "__init__.py").write_text("".join(lines))


def _stubs(place: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler, for stubs of TensorRT's libraries")
    source = "".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS)
    for library in LIBRARIES:
        name = f"lib{library}.so.11"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(place / name), "-x", "c", "-"]
        subprocess.run(command, input=source, text=True, check=True)
