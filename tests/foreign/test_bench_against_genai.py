"""`bench --against onnxruntime-genai` in an environment of its own: it runs the bundle, and says the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from environments import ROOT, environment

pytestmark = pytest.mark.foreign
REQUIREMENTS = ["onnxruntime-genai==0.18.0", "onnxruntime"]
PROGRAM = [sys.executable, "-c", "from exporter.cli import main; main()"]


def test_it_takes_its_turns_and_says_what_the_bundle_says(tiny_bundle: Path) -> None:
    python = environment("genai", REQUIREMENTS) / "python"
    options = ["--against", "onnxruntime-genai", "--peer-python", f"onnxruntime-genai={os.path.relpath(python, ROOT)}"]
    cases = ["--prompt-tokens", "16", "--prompt-tokens", "504", "--batch-size", "1", "--batch-size", "3"]
    command = [*PROGRAM, "bench", str(tiny_bundle), *options, *cases, "--new-tokens", "8", "--rounds", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (peer,) = report["peers"]
    assert peer["versions"]["onnxruntime-genai"] == "0.18.0"
    assert [(speed["batch"], speed["prompt_tokens"]) for speed in peer["speeds"]] == [
        (1, 16),
        (1, 504),
        (3, 16),
        (3, 504),
    ]
    for ours, theirs in zip(report["speeds"], peer["speeds"], strict=True):
        assert theirs["unable"] is None
        assert theirs["ours"]["same_tokens"] == 1.0
        assert theirs["step_bytes"] == ours["step_bytes"]  # of the same graph
        assert 0 < theirs["roofline_share"] < 1
