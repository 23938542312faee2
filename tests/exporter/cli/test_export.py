from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from runtime.errors import CheckFailed
from runtime.manifest import FileRecord, Graph, Lowering, Manifest, PassRecord, Source
from runtime.measured import Comparison, Parity

ROOT = Path(__file__).parents[3]
PARITY = Parity(
    evaluated_by="onnxruntime-cpu 1.32.0",
    passed=True,
    comparisons=(Comparison(name="logits", case="prefill", metric="max_abs", value=2e-6, limit=1e-4, passed=True),),
)
MANIFEST = Manifest(
    tool="nemotron-export 0.1.0",
    created="2026-01-01T00:00:00Z",
    source=Source(name="tiny", fingerprint="0" * 64),
    task="text-generation",
    target="onnxruntime",
    precision="fp32",
    opset=21,
    max_length=512,
    graph=Graph(inputs=(), outputs=()),
    passes=(PassRecord(name="fuse_partial_rope_attention", count=4),),
    lowering=Lowering(attention="GroupQueryAttention"),
    parity=PARITY,
    files={"model.onnx": FileRecord(sha256="0" * 64, bytes=2_500_000)},
)


@dataclass(frozen=True)
class Result:
    bundle: Path
    seconds: dict[str, float]
    peak_rss_mb: float
    manifest: Manifest

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, "bundle": str(self.bundle), "manifest": self.manifest.to_json()}


class FakeExporter(ModuleType):
    """Stands for `exporter.export`: notes what it is asked for, prints as libraries do, and reports progress."""

    def __init__(self) -> None:
        super().__init__("exporter.export")
        self.asked: list[Any] = []
        self.error: Exception | None = None
        self.ExportOptions = lambda **options: options

    def export(
        self, checkpoint: Path, bundle: Path | None, options: Any, progress: Any, *, room_checked: bool
    ) -> Result:
        assert room_checked
        self.asked.append((checkpoint, bundle, options))
        print("[torch.onnx] a library's chatter")
        for stage in ("trace", "passes", "weights", "verify"):
            progress(stage, 0, 1)
            progress(stage, 1, 1)
            if stage == "weights" and self.error:
                raise self.error
        return Result(bundle or Path("artifacts/default"), {"trace": 1.25, "verify": 2.0}, 616.4, MANIFEST)


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> FakeExporter:
    fake = FakeExporter()
    monkeypatch.setitem(sys.modules, "exporter.export", fake)
    monkeypatch.setattr("exporter.preflight.check_room", lambda *_: None)  # the checkpoints here are empty
    return fake


def test_the_defaults_are_those_of_the_contract(cli, exporter, tmp_path):
    assert cli("export", tmp_path).code == 0
    expected = {
        "task": None,
        "target": "onnxruntime",
        "precision": "fp32",
        "max_length": None,
        "cache": None,
        "inputs": "ids",
        "position_ids": False,
        "output_hidden_states": False,
        "output_attentions": False,
        "recipe": None,
        "kv_cache": None,
        "calibration": None,
        "calibration_tokens": 16384,
        "calibration_seed": 0,
        "fp16_safe": True,
        "eval_text": None,
        "eval_tokens": 4096,
        "max_kl": None,
        "max_perplexity_increase": None,
        "verify": True,
        "memory": None,
        "weights": "copy",
        "force": False,
        "adapter": None,
    }
    assert exporter.asked == [(tmp_path, None, expected)]


def test_every_flag_arrives(cli, exporter, tmp_path):
    flags = (
        "--task text-generation --target tensorrt --precision int4 --max-length 64 --no-verify --force --memory 1.5GiB "
        "--weights link"
    )
    more = "--no-cache --inputs embeds --position-ids --output-hidden-states --output-attentions"
    rounding = (
        "--recipe fine --kv-cache int8 --calibration c.txt --calibration-tokens 512 --calibration-seed 3 --no-fp16-safe"
    )
    measured = "--eval-text e.txt --eval-tokens 256 --max-kl 0.1 --max-perplexity-increase 2"
    every = " ".join((flags, more, rounding, measured)).split()
    cli("export", tmp_path, tmp_path / "out", *every, "--adapter", tmp_path)
    _, bundle, options = exporter.asked[0]
    assert bundle == tmp_path / "out"
    assert options == {
        "task": "text-generation",
        "target": "tensorrt",
        "precision": "int4",
        "max_length": 64,
        "cache": False,
        "inputs": "embeds",
        "position_ids": True,
        "output_hidden_states": True,
        "output_attentions": True,
        "recipe": "fine",
        "kv_cache": "int8",
        "calibration": Path("c.txt"),
        "calibration_tokens": 512,
        "calibration_seed": 3,
        "fp16_safe": False,
        "eval_text": Path("e.txt"),
        "eval_tokens": 256,
        "max_kl": 0.1,
        "max_perplexity_increase": 2,
        "verify": False,
        "memory": 1536 * 1024**2,
        "weights": "link",
        "force": True,
        "adapter": tmp_path,
    }


def test_a_path_that_cannot_be_a_hub_id_is_refused_at_once(cli, exporter, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)  # what would be called is not
    outcome = cli("export", "./absent/model")
    assert (outcome.code, exporter.asked) == (2, [])
    assert outcome.err.startswith("error: ./absent/model is not a directory; download the checkpoint first")


def test_an_adapter_that_is_no_directory_is_refused_at_once(cli, exporter, tmp_path):
    outcome = cli("export", tmp_path, "--adapter", tmp_path / "absent")
    assert (outcome.code, exporter.asked) == (2, [])
    assert (
        outcome.err == f"error: {tmp_path / 'absent'} is not a directory; give the one that peft saved the adapter to\n"
    )


def test_a_revision_of_a_directory_is_refused_at_once(cli, exporter, tmp_path):
    outcome = cli("export", tmp_path, "--revision", "v2")
    assert (outcome.code, exporter.asked) == (2, [])
    assert "drop --revision" in outcome.err


def test_a_destination_that_exists_is_refused_before_anything_is_downloaded(cli, exporter, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert "--force" in cli("export", "somebody/model", tmp_path).err


def test_json_is_one_object_whatever_libraries_print(cli, exporter, tmp_path):
    outcome = cli("export", tmp_path, "--json")
    assert json.loads(outcome.out)["bundle"] == "artifacts/default"
    assert "chatter" in outcome.err


def test_a_log_gets_a_line_for_each_stage(cli, exporter, tmp_path):
    err = cli("export", tmp_path).err
    assert [line.split()[0] for line in err.splitlines()[1:]] == ["trace", "passes", "weights", "verify"]


def test_the_result_shows_what_was_checked_and_what_to_do_next(cli, exporter, tmp_path):
    out = cli("export", tmp_path).out
    for words in ("2.5 MB", "fuse_partial_rope_attention ×4", "trace 1.2, verify 2.0", "616.4 MB", "limit 0.0001"):
        assert words in out
    assert "nemotron-export generate artifacts/default -p TEXT" in out


def test_an_export_that_differs_exits_1(cli, exporter, tmp_path):
    exporter.error = CheckFailed("the export is not the checkpoint's model")
    outcome = cli("export", tmp_path, "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.endswith("error: the export is not the checkpoint's model\n")


def test_a_full_disk_names_the_destination_where_the_system_does_not(cli, exporter, tmp_path):
    exporter.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    outcome = cli("export", tmp_path, tmp_path / "bundle")
    assert outcome.code == 2
    assert f"error: {tmp_path / 'bundle'}: No space left on device; free space there" in outcome.err


def test_a_destination_that_exists_is_refused_at_once(cli, exporter, tmp_path):
    outcome = cli("export", tmp_path, tmp_path)
    assert (outcome.code, exporter.asked) == (2, [])
    assert "--force" in outcome.err


@pytest.mark.parametrize("command", ["export", "verify", "demo"])
def test_without_torch_the_command_that_installs_it_is_named(command, tmp_path, tiny_checkpoint):
    script = (
        "import sys; sys.modules['torch'] = None; import runtime.bundle; runtime.bundle.Bundle.open = lambda path: 0;"
        "from exporter.cli import main; main()"
    )
    places = {"export": [tiny_checkpoint, tmp_path / "b"], "verify": ["b", tiny_checkpoint], "demo": []}[command]
    outcome = subprocess.run(
        [sys.executable, "-c", script, command, *places], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr == "error: torch is not installed; pip install 'nemotron-export[export,cpu]'\n"
    assert not (tmp_path / "b").exists()


def test_the_choices_are_what_the_exporter_and_the_runtime_know():
    from exporter import lowering, plan, recipe, tasks
    from exporter.cli import _options
    from exporter.cli import export as command
    from runtime import session

    assert tuple(tasks.TASKS) == command.TASKS
    assert (plan.INPUTS, plan.WEIGHTS) == (command.INPUTS, command.WEIGHTS)
    assert tuple(lowering.TARGETS) == tuple(recipe.FORMS) == command.TARGETS
    assert {name for target in lowering.TARGETS.values() for name in target.kv_caches} == set(command.KV_CACHES)
    assert {name for forms in recipe.FORMS.values() for name in forms} == set(command.PRECISIONS)
    assert (session.BACKENDS, session.DEVICES) == (_options.BACKENDS, _options.DEVICES)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty; give a UTF-8 text file"),
        (b"\xff\xfe\x00", "is not UTF-8 text (byte 0)"),
        (b"Too short.", "less than one window of 256; give a longer text"),
        (None, "is missing; give a UTF-8 text file"),
    ],
    ids=["empty", "binary", "short", "missing"],
)
def test_a_text_that_calibrates_nothing_is_one_line_and_leaves_nothing(
    content, reason, cli, tiny_checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr("exporter.export.trace", None)  # what would take seconds is not begun
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    options = ("--kv-cache", "int8", "--calibration", text)
    outcome = cli("export", tiny_checkpoint, tmp_path / "bundle", *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith(f"error: {text} ")
    assert reason in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "bundle").exists()


def test_a_calibration_of_nothing_is_refused(cli, tiny_checkpoint, tmp_path):
    outcome = cli("export", tiny_checkpoint, tmp_path / "bundle", "--calibration", "text.txt")
    assert outcome.code == 2
    assert outcome.err == (
        "error: --calibration: --precision fp32 with recipe plain chooses nothing by a text; leave it out, or take "
        "--recipe aware or --kv-cache int8\n"
    )
