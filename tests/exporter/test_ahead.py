"""Hashing while a layer is traced changes no fingerprint, and hides nothing that is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.ahead import hashed_ahead
from exporter.checkpoint import Checkpoint
from exporter.tensor_slices import read_slices
from runtime.errors import UserError


def fingerprint(checkpoint: Checkpoint) -> str:
    for name in checkpoint.tensors:
        checkpoint.read(name)
    return checkpoint.fingerprint()


def test_the_fingerprint_is_that_of_reading(small_checkpoint: Path) -> None:
    expected = fingerprint(Checkpoint.open(small_checkpoint))
    checkpoint = Checkpoint.open(small_checkpoint)
    with hashed_ahead(checkpoint, checkpoint.tensors):
        while len(checkpoint._digests) < len(checkpoint.tensors):
            pass
    assert checkpoint.fingerprint() == expected
    assert fingerprint(checkpoint) == expected


def test_a_tensor_in_several_runs_has_the_same_digest(small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.ahead._RUN", 100)
    test_the_fingerprint_is_that_of_reading(small_checkpoint)


def test_what_is_not_hashed_in_time_is_hashed_when_it_is_read(small_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(small_checkpoint)
    with hashed_ahead(checkpoint, checkpoint.tensors):
        pass
    assert fingerprint(checkpoint) == fingerprint(Checkpoint.open(small_checkpoint))


def test_a_file_that_is_cut_meanwhile_is_named_by_who_reads_it(small_copy: Path) -> None:
    checkpoint = Checkpoint.open(small_copy)
    file = small_copy / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1000)
    with hashed_ahead(checkpoint, checkpoint.tensors):
        pass
    assert not checkpoint._digests
    with pytest.raises(UserError, match="has changed or was truncated"):
        list(read_slices("lm_head.weight", checkpoint.tensors["lm_head.weight"]))
