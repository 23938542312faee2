"""An export that cannot suffice is refused before any work, and one that can is not."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from refusals import assert_tells

import exporter.export as module
from exporter.export import ExportOptions, export
from exporter.preflight import check_room
from runtime.errors import UserError

Usage = namedtuple("Usage", "total used free")
UNCHECKED = ExportOptions(verify=False)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A disk with 240 kB free; the directories that were asked about."""
    asked: list[Path] = []

    def usage(path: Path) -> Usage:
        asked.append(Path(path))
        return Usage(10**9, 10**9 - 240_000, 240_000)

    monkeypatch.setattr("shutil.disk_usage", usage)
    return asked


def refusal(checkpoint: Path, destination: Path, options: ExportOptions) -> UserError:
    with pytest.raises(UserError) as refused:
        check_room(checkpoint, destination, options)
    assert "\n" not in str(refused.value)
    return refused.value


def test_a_bundle_that_the_disk_cannot_hold_is_refused_and_a_smaller_one_is_not(
    small_checkpoint: Path, tmp_path: Path, disk: list[Path]
) -> None:
    destination = tmp_path / "a" / "b" / "bundle"
    error = refusal(small_checkpoint, destination, UNCHECKED)
    assert_tells(error, tmp_path, "240.0 kB free", "at fp32", "choose another place", "lower precision", "plan")
    assert disk == [tmp_path]  # the nearest place that exists
    check_room(small_checkpoint, destination, replace(UNCHECKED, precision="int4"))


def test_the_bundle_that_force_replaces_makes_no_room(old: Path, small_checkpoint: Path, disk: list[Path]) -> None:
    error = refusal(small_checkpoint, old, replace(UNCHECKED, force=True))
    assert_tells(error, old.parent, "240.0 kB free")
    assert (old / "model.onnx").exists()


def test_memory_that_is_given_counts_and_not_what_there_is(small_checkpoint: Path, tmp_path: Path) -> None:
    error = refusal(small_checkpoint, tmp_path / "bundle", replace(UNCHECKED, memory=10**8))
    assert_tells(error, "100.0 MB are given", "at least 350.0 MB", "raise --memory", "plan")
    check_room(small_checkpoint, tmp_path / "bundle", replace(UNCHECKED, memory=4 * 10**8))


def test_a_machine_with_too_little_memory_is_told_and_the_gate_can_be_left_to_another(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.preflight.available_memory", lambda: 2 * 10**8)
    error = refusal(small_checkpoint, tmp_path / "bundle", ExportOptions())
    assert_tells(error, "200.0 MB are available", "larger machine", "--no-verify")


def test_the_library_refuses_as_the_command_does_before_anything_runs(
    small_checkpoint: Path, tmp_path: Path, untraced: None, disk: list[Path]
) -> None:
    with pytest.raises(UserError, match="kB free"):
        export(small_checkpoint, tmp_path / "a" / "bundle", UNCHECKED)
    assert list(tmp_path.iterdir()) == []


def test_the_room_is_checked_once(
    cli_export: list[object], small_checkpoint: Path, tmp_path: Path, quick: None
) -> None:
    from exporter.cli import run

    assert run(["export", str(small_checkpoint), str(tmp_path / "bundle"), "--no-verify"]) == 0
    assert len(cli_export) == 1


@pytest.fixture
def cli_export(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The calls of `check_room`, whoever makes them."""
    calls: list[object] = []

    def noted(*arguments: object) -> None:
        calls.append(arguments)

    monkeypatch.setattr("exporter.preflight.check_room", noted)
    monkeypatch.setattr(module, "check_room", noted)
    return calls


def test_a_pickled_checkpoint_is_measured_too(tmp_path: Path, disk: list[Path]) -> None:
    import torch
    from safetensors.torch import load_file

    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert_tells(refusal(checkpoint, tmp_path / "bundle", UNCHECKED), "240.0 kB free")


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_what_is_no_checkpoint_is_named_as_ever(missing: str, small_copy: Path, tmp_path: Path) -> None:
    (small_copy / missing).unlink()
    assert_tells(refusal(small_copy, tmp_path / "bundle", UNCHECKED), small_copy)
