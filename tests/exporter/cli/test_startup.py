"""What commands import: --help is instant, and the deployment machine needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from forward_bundles import Toy
from lm_eval_tasks import write_tasks

ROOT = Path(__file__).parents[3]
COMMANDS = (
    *("demo", "plan", "export", "verify", "diagnose", "build", "package", "selftest"),
    *("generate", "chat", "predict", "inspect", "bench", "compare", "eval", "doctor"),
)
QUICK_BENCH = ("--rounds", "1", "--new-tokens", "2", "--prompt-tokens", "4", "--batch-size", "1")
EXPORT_ONLY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "ml_dtypes")
HEAVY = (*EXPORT_ONLY, "numpy", "rich", "matplotlib", "onnxruntime", "tokenizers", "jinja2")

# Runs a command, then tells on stderr's last line the modules it loaded and the processor time it took.
_PROBE = """
import json, sys, time
from exporter.cli import run
code = run(sys.argv[1:])
report = {"code": code, "seconds": time.process_time(), "modules": list(sys.modules)}
print(json.dumps(report), file=sys.stderr)
"""


def probe(*arguments: object, stdin: str = "") -> dict:
    command = [sys.executable, "-c", _PROBE, *map(str, arguments)]
    outcome = subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=ROOT, timeout=300, check=True)
    return {"out": outcome.stdout, **json.loads(outcome.stderr.splitlines()[-1])}


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_imports_nothing_heavy(command):
    report = probe(*command, "--help")
    assert report["code"] == 0
    assert not set(HEAVY) & set(report["modules"])
    assert "nemotron-export " in report["out"]  # an example


def test_help_answers_in_under_a_third_of_a_second():
    # Processor time, the best of three: what else the machine does is not the program's.
    assert min(probe("--help")["seconds"] for _ in range(3)) < 0.3


def test_help_lists_every_command():
    assert all(f"\n  {name} " in probe("--help")["out"] for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "{bundle}", "-p", "Mars is", "--max-new-tokens", "3"),
        ("generate", "{bundle}", "--prompt-ids", "5,6", "--max-new-tokens", "3", "--json"),
        ("chat", "{bundle}", "--max-new-tokens", "3"),
        ("selftest", "{bundle}", "--json"),
        ("inspect", "{bundle}", "--json"),
        ("inspect", "{checkpoint}", "--json"),
        ("bench", "{bundle}", *QUICK_BENCH, "--json"),
        pytest.param(
            ("bench", "{bundle}", *QUICK_BENCH, "--against", "transformers", "--checkpoint", "{checkpoint}"),
            marks=pytest.mark.slow,
        ),
        ("compare", "{bundle}", "--json"),
        ("package", "{bundle}", "--triton", "{models}", "--json"),
        ("doctor", "--json"),
    ],
)
def test_the_deployment_machine_needs_no_torch(arguments, tiny_bundle, tiny_checkpoint, tmp_path):
    places = {"bundle": tiny_bundle, "checkpoint": tiny_checkpoint, "models": tmp_path / "models"}
    report = probe(*(argument.format(**places) for argument in arguments), stdin="Hello\n")
    assert report["code"] == 0
    assert report["out"]
    graph = (
        {"onnx", "ml_dtypes"} if arguments[:2] == ("inspect", "{bundle}") else set()
    )  # read where they are installed
    assert not (set(EXPORT_ONLY) - graph) & set(report["modules"])


def test_predicting_needs_no_torch(tmp_path):
    path = Toy("text-classification").write(tmp_path / "toy", golden=True)
    report = probe("predict", path, "--text", "mars", "--json")
    assert report["code"] == 0
    assert report["out"]
    assert not set(EXPORT_ONLY) & set(report["modules"])


def test_benchmarks_need_no_torch(tiny_bundle, tiny_checkpoint, tmp_path):
    tasks = write_tasks(tmp_path, tiny_checkpoint / "heldout.txt")
    names = "tiny_choice,tiny_text,tiny_answer"
    report = probe("eval", tiny_bundle, "--tasks", names, "--include-path", tasks, "--limit", 4, "--json")
    assert report["code"] == 0
    assert len(json.loads(report["out"])["tasks"]) == 3
    assert not set(EXPORT_ONLY) & set(report["modules"])


@pytest.mark.parametrize(
    ("option", "told"),
    [(("--memory", "100MB"), "100.0 MB are given"), (("--precision", "int4", "--memory", "1kB"), "1.0 kB")],
)
def test_too_little_memory_is_refused_before_torch_is_loaded(option, told, tiny_checkpoint, tmp_path):
    script = f"import sys; sys.stderr = sys.stdout\n{_PROBE}"  # the message with the report
    command = [sys.executable, "-c", script, "export", str(tiny_checkpoint), str(tmp_path / "bundle"), *option]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=True)
    message, report = outcome.stdout.splitlines()[0], json.loads(outcome.stdout.splitlines()[-1])
    assert report["code"] == 2
    assert message.startswith("error: the export needs at least")
    assert told in message
    assert not {"torch", "transformers", "onnx_ir", "onnxruntime"} & set(report["modules"])
    assert report["seconds"] < 1  # of the processor: what else the machine does is not the program's


@pytest.mark.parametrize(
    "arguments", [("export", "/nowhere"), ("verify", "/nowhere", "."), ("verify", ".", "/nowhere")]
)
def test_a_mistyped_path_is_refused_before_torch_is_loaded(arguments):
    report = probe(*arguments)
    assert report["code"] == 2
    assert "torch" not in report["modules"]
