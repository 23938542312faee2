"""What is installed: our three packages and the demo's checkpoint, and text without torch."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from environments import environment, run

pytestmark = pytest.mark.foreign
PROMPT = "Complete the paragraph: our solar system is"


def test_the_wheel_brings_our_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "exporter",
        "runtime",
        "plugins",
        "nemotron_export-0.1.0.dist-info",
    }
    assert "exporter/data/tiny-nemotron/model.safetensors" in names
    assert "exporter/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_environment_without_torch_generates_what_this_one_does(wheel: Path, tiny_bundle: Path) -> None:
    from runtime import load

    bin_ = environment("runtime", [f"{wheel}[cpu]"])
    installed = {line.split("==")[0].lower() for line in run([bin_ / "pip", "freeze"]).splitlines()}
    assert not installed & {"torch", "transformers", "onnx", "onnxscript", "onnx-ir"}

    program = bin_ / "nemotron-export"
    options = ["-p", PROMPT, "--greedy", "--max-new-tokens", "24", "--json"]
    generated = json.loads(run([program, "generate", tiny_bundle, *options]))["sequences"][0]
    expected = load(tiny_bundle).generate(PROMPT, greedy=True, max_new_tokens=24).sequences[0]
    assert (generated["token_ids"], generated["text"]) == (expected.token_ids, expected.text)
    assert json.loads(run([program, "selftest", tiny_bundle, "--json"]))["passed"]
    for command in (["inspect", tiny_bundle], ["doctor"]):
        assert json.loads(run([program, *command, "--json"]))["schema"] == 1


def test_without_any_onnxruntime_the_error_names_both_extras(wheel: Path, tiny_bundle: Path) -> None:
    bin_ = environment("base", [str(wheel)])
    with pytest.raises(AssertionError, match=r"(?s)exit 2.*nemotron-export\[cpu\].*nemotron-export\[gpu\]"):
        run([bin_ / "nemotron-export", "generate", tiny_bundle, "-p", PROMPT])
