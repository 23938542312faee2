"""A checkpoint, a destination or a disk that is not as it should be: told in one line, with nothing left or damaged."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import safetensors_files as by_hand
import torch
from checkpoints import write_tokenizer
from refusals import assert_tells, snapshot

from exporter.checkpoint import Checkpoint
from exporter.companions import write_companions
from exporter.export import ExportOptions, export
from exporter.origin import Origin
from exporter.weights import write_weights
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden

NORM = "model.norm.weight"
STAGES = ("trace", "passes", "weights", "verify")
UNCHECKED = ExportOptions(verify=False)


def tensor_missing(checkpoint: Path) -> str:
    tensors = by_hand.read(checkpoint / "model.safetensors")
    del tensors[NORM]
    by_hand.write(checkpoint / "model.safetensors", tensors)
    return NORM


def tensor_misshapen(checkpoint: Path) -> str:
    tensors = by_hand.read(checkpoint / "model.safetensors")
    by_hand.write(checkpoint / "model.safetensors", tensors | {NORM: by_hand.from_float32(np.ones(63))})
    return NORM


def shard_missing(checkpoint: Path) -> str:
    by_hand.shard(checkpoint, 2)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors"


def shard_truncated(checkpoint: Path) -> str:
    by_hand.shard(checkpoint, 2)
    shard = checkpoint / "model-00002-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)
    return shard.name


def configured(**values: object) -> Callable[[Path], str]:
    def change(checkpoint: Path) -> str:
        path = checkpoint / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return next(iter(values))

    change.__name__ = next(iter(values))
    return change


def other_architecture(checkpoint: Path) -> str:
    configured(architectures=["NemotronForMaskedLM"])(checkpoint)
    return "NemotronForMaskedLM"


def no_tokenizer(checkpoint: Path) -> str:
    (checkpoint / "tokenizer.json").unlink()
    return "tokenizer.json"


def tokenizer_damaged(checkpoint: Path) -> str:
    os.truncate(checkpoint / "tokenizer.json", 50)
    return "tokenizer.json"


def tokenizer_too_large(checkpoint: Path) -> str:
    write_tokenizer(checkpoint, 200)
    return "token id 199"


def generation_defaults_damaged(checkpoint: Path) -> str:
    (checkpoint / "generation_config.json").write_text('{"temperature": "hot"}')
    return "generation_config.json"


def not_there(checkpoint: Path) -> str:
    shutil.rmtree(checkpoint)
    return checkpoint.name


DAMAGES = (
    *(tensor_missing, tensor_misshapen, shard_missing, shard_truncated, not_there),
    *(no_tokenizer, tokenizer_damaged, tokenizer_too_large, generation_defaults_damaged, other_architecture),
    *(configured(model_type="llama"), configured(hidden_act="swiglu")),
    configured(rope_scaling={"type": "axial", "factor": 2.0}),
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_checkpoint_is_refused_before_the_trace(untraced, small_copy, tmp_path, damage) -> None:
    named = damage(small_copy).replace("rope_scaling", "rope type")
    (tmp_path / "place").mkdir()
    with pytest.raises(UserError) as refused:
        export(small_copy, tmp_path / "place" / "a" / "bundle", ExportOptions())
    assert_tells(refused.value, named, small_copy)
    assert snapshot(tmp_path / "place") == {}


@pytest.mark.parametrize("force", [False, True])
def test_a_destination_that_is_not_a_bundle_is_refused_before_the_trace(
    untraced, small_checkpoint, tmp_path, force
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    with pytest.raises(UserError) as refused:
        export(small_checkpoint, tmp_path / "mine", ExportOptions(force=force))
    assert_tells(refused.value, tmp_path / "mine", "choose another place")
    assert snapshot(tmp_path / "mine") == {"manifest.json": b"{}"}
    assert not list(tmp_path.glob(".mine*"))


@pytest.mark.parametrize("place", [".", "checkpoints"])
def test_force_does_not_delete_the_checkpoint_with_the_bundle_it_lies_in(old: Path, small_checkpoint, place) -> None:
    inside = old / place / "small"
    shutil.copytree(small_checkpoint, inside)
    before = snapshot(old)
    with pytest.raises(UserError) as refused:
        export(inside, old, ExportOptions(force=True))
    assert_tells(refused.value, inside, old, "choose another place")
    assert snapshot(old) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_leave_no_bundle_and_the_old_one(old: Path, small_copy: Path, value) -> None:
    tensors = by_hand.read(small_copy / "model.safetensors")
    bad = by_hand.float32(tensors[NORM]).copy()
    bad[7] = value
    by_hand.write(small_copy / "model.safetensors", tensors | {NORM: by_hand.from_float32(bad)})
    before = snapshot(old.parent)
    for destination, options in ((old, ExportOptions(force=True)), (old.parent / "a" / "new", UNCHECKED)):
        with pytest.raises(UserError) as refused:
            export(small_copy, destination, options)
        assert_tells(refused.value, small_copy, NORM, "NaN or infinity")
        assert snapshot(old.parent) == before


# What interrupts an export


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("late", [False, True], ids=["as it begins", "as it ends"])
def test_an_interruption_leaves_nothing_and_damages_nothing(old, small_checkpoint, stage: str, late: bool) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if name == stage and done == (total if late else 0):
            raise KeyboardInterrupt

    before = snapshot(old.parent)
    for destination, force in ((old, True), (old.parent / "a" / "b" / "new", False)):
        with pytest.raises(KeyboardInterrupt):
            export(small_checkpoint, destination, ExportOptions(force=force), interrupt)
        assert snapshot(old.parent) == before


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*args: object, **options: object) -> None:
        raise error

    return fail


WRITERS = (
    "exporter.export.write_weights",
    "exporter.export.ir.save",
    "exporter.export.write_companions",
    "runtime.manifest.Manifest.save",
    "exporter.export.gate",
    "runtime.golden.Golden.save",
)


@pytest.mark.parametrize("writer", WRITERS)
def test_an_interruption_in_the_middle_of_a_stage_leaves_nothing(old, small_checkpoint, monkeypatch, writer) -> None:
    before = snapshot(old.parent)
    monkeypatch.setattr(writer, failing(KeyboardInterrupt()))
    for destination, force in ((old, True), (old.parent / "a" / "b" / "new", False)):
        with pytest.raises(KeyboardInterrupt):
            export(small_checkpoint, destination, ExportOptions(force=force))
        assert snapshot(old.parent) == before


def assert_told_of_a_full_disk(checkpoint: Path, old: Path, reason: str) -> None:
    before = snapshot(old.parent)
    for destination, force in ((old, True), (old.parent / "a" / "new", False)):
        with pytest.raises(UserError) as refused:
            export(checkpoint, destination, ExportOptions(force=force))
        assert_tells(refused.value, destination, reason, "free space there")
        assert str(checkpoint) not in str(refused.value)  # which is not what is full
        assert snapshot(old.parent) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_disk_that_fills_up_while_weights_are_written_is_told(old, small_checkpoint, monkeypatch) -> None:
    original = Path.open

    def on_a_full_disk(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        full = path.name == "model.onnx.data" and mode == "w+b"  # reading /dev/full would never end
        return original(Path("/dev/full") if full else path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    assert_told_of_a_full_disk(small_checkpoint, old, os.strerror(errno.ENOSPC))


def limited(writer: Callable[..., Any], size: int) -> Callable[..., Any]:
    """A function within which the system lets no file grow beyond `size` bytes."""

    def run(*args: Any, **options: Any) -> Any:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            return writer(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, ignored)

    return run


@pytest.mark.parametrize(
    ("owner", "name", "size"),
    [
        ("exporter.export", "write_weights", 300_000),
        ("exporter.export.ir", "save", 4096),
        ("exporter.export", "write_companions", 1000),
        ("runtime.golden.Golden", "save", 500),
    ],
)
def test_a_file_that_does_not_fit_is_told_with_the_place_that_is_full(
    old, small_checkpoint, monkeypatch, owner, name, size
) -> None:
    writers = {"write_weights": write_weights, "write_companions": write_companions}
    writer = writers.get(name) or (ir.save if owner.endswith("ir") else Golden.save)
    monkeypatch.setattr(f"{owner}.{name}", limited(writer, size))
    assert_told_of_a_full_disk(small_checkpoint, old, os.strerror(errno.EFBIG))


# The gate


def test_a_wrong_weight_recipe_leaves_no_bundle_and_the_old_one(old: Path, small_checkpoint, monkeypatch) -> None:
    right = Origin.apply

    def without_the_one(self: Origin, *given: Any) -> torch.Tensor:
        return right(Origin(self.tensor, transposed=self.transposed), *given)

    monkeypatch.setattr(Origin, "apply", without_the_one)
    before = snapshot(old.parent)
    for destination, force in ((old, True), (old.parent / "a" / "new", False)):
        with pytest.raises(CheckFailed) as failed:
            export(small_checkpoint, destination, ExportOptions(force=force))
        assert failed.value.exit_code == 1
        message = str(failed.value)
        assert "\n" not in message
        assert "not the checkpoint's model" in message
        assert "no bundle was written" in message
        assert snapshot(old.parent) == before
    export(small_checkpoint, old.parent / "unchecked", UNCHECKED)  # it was the gate that refused


def test_a_weight_from_another_layer_is_noticed(quick, small_checkpoint, tmp_path, monkeypatch) -> None:
    read = Checkpoint.slices
    other = lambda self, name, **how: read(self, name.replace("layers.1.mlp", "layers.0.mlp"), **how)  # noqa: E731
    monkeypatch.setattr(Checkpoint, "slices", other)
    with pytest.raises(CheckFailed):
        export(small_checkpoint, tmp_path / "b", ExportOptions())
    assert not (tmp_path / "b").exists()
