"""Pickled checkpoints give the tensors that safetensors would, run no code, and are never in memory as a whole."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pickles
import pytest
import safetensors_files as by_hand
import torch
from checkpoints import write_checkpoint
from refusals import assert_tells
from safetensors.torch import load_file

from exporter.checkpoint import Checkpoint
from runtime.errors import UserError

NORM = "model.norm.weight"
SECOND = pickles.shard_name(2, 3)


def refusal(path: Path) -> UserError:
    with pytest.raises(UserError) as refused:
        Checkpoint.open(path)
    return refused.value


def read_all(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    checkpoint = Checkpoint.open(path)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    return tensors, checkpoint.fingerprint()


@pytest.fixture
def pickled(small_copy: Path) -> Path:
    pickles.repickle(small_copy)
    return small_copy


@pytest.fixture
def sharded(small_copy: Path) -> Path:
    pickles.repickle(small_copy, 3)
    return small_copy


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_pickles_are_read_as_the_same_tensors_in_safetensors(tmp_path: Path, dtype: torch.dtype, count: int) -> None:
    path = write_checkpoint(tmp_path / "checkpoint", dtype=dtype)
    stored, fingerprint = load_file(path / "model.safetensors"), read_all(path)[1]
    opened = Checkpoint.open(path).tensors
    pickles.repickle(path, count)
    tensors, found = read_all(path)
    assert found == fingerprint
    assert tensors.keys() == stored.keys()
    assert all(tensors[name].dtype == dtype and torch.equal(tensors[name], stored[name]) for name in stored)
    infos = Checkpoint.open(path).tensors
    assert {n: (i.dtype, i.shape) for n, i in infos.items()} == {n: (i.dtype, i.shape) for n, i in opened.items()}
    assert not Checkpoint.open(path).safetensors


def test_where_there_are_both_the_safetensors_count_as_they_do_for_transformers(small_copy: Path) -> None:
    original = read_all(small_copy)[1]
    torch.save({NORM: torch.zeros(64)}, small_copy / pickles.SINGLE)
    assert Checkpoint.open(small_copy).safetensors
    assert read_all(small_copy)[1] == original
    by_hand.shard(small_copy, 2)
    assert Checkpoint.open(small_copy).safetensors


def test_views_parameters_and_shared_storage_are_tensors_like_others(pickled: Path) -> None:
    whole = torch.arange(128.0).reshape(64, 2)
    pickles.change(pickled / pickles.SINGLE, {NORM: whole[:, 1], "model.norm.bias": torch.nn.Parameter(whole[:, 0])})
    checkpoint = Checkpoint.open(pickled)
    assert torch.equal(checkpoint.read(NORM), whole[:, 1])
    assert torch.equal(checkpoint.read("model.norm.bias"), whole[:, 0])
    assert not checkpoint.read("model.norm.bias").requires_grad


def test_a_state_dict_as_torch_calls_it_is_read(pickled: Path) -> None:
    torch.save(OrderedDict(torch.load(pickled / pickles.SINGLE)), pickled / pickles.SINGLE)
    assert Checkpoint.open(pickled).read(NORM).shape == (64,)


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["HARM"],)


def _as_zip(value: Any, file: Path) -> None:
    torch.save(value, file)


def _as_plain_pickle(value: Any, file: Path) -> None:
    file.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("save", [_as_zip, _as_plain_pickle])
def test_a_pickle_never_runs_its_code(pickled: Path, tmp_path: Path, monkeypatch, save: Callable[..., None]) -> None:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    save({NORM: _Harmful()}, pickled / pickles.SINGLE)
    assert_tells(refusal(pickled), pickled / pickles.SINGLE, "convert the checkpoint to safetensors")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({"state_dict": {NORM: torch.zeros(2)}}, "'state_dict'"),
        ({NORM: torch.zeros(2), "epoch": 3}, "'epoch'"),
        ({NORM: torch.zeros(2).to_sparse()}, NORM),
        ({NORM: torch.zeros(2, device="meta")}, NORM),
        ({7: torch.zeros(2)}, "7"),
    ],
)
def test_a_pickle_with_anything_but_named_tensors_is_refused(pickled: Path, content: Any, words: str) -> None:
    torch.save(content, pickled / pickles.SINGLE)
    assert_tells(refusal(pickled), pickled / pickles.SINGLE, words, "convert the checkpoint to safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused_as_in_safetensors(pickled: Path, dtype: torch.dtype) -> None:
    pickles.change(pickled / pickles.SINGLE, {NORM: torch.zeros(64).to(dtype)})
    assert_tells(refusal(pickled), pickled / pickles.SINGLE, NORM, "known: F32, F16, BF16")


def test_a_weight_that_is_not_finite_is_refused_by_name(pickled: Path) -> None:
    pickles.change(pickled / pickles.SINGLE, {NORM: torch.full((64,), torch.nan)})
    with pytest.raises(UserError) as refused:
        Checkpoint.open(pickled).read(NORM)
    assert_tells(refused.value, pickled / pickles.SINGLE, NORM, "NaN or infinity")


def test_the_format_before_torch_1_6_which_cannot_be_mapped_is_refused(pickled: Path) -> None:
    file = pickled / pickles.SINGLE
    torch.save(torch.load(file), file, _use_new_zipfile_serialization=False)
    assert_tells(refusal(pickled), file, "zip format", "convert the checkpoint to safetensors")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def git_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


def garbled(path: Path) -> None:
    content = bytearray(path.read_bytes())
    at = content.index(b"data.pkl") + 200
    content[at : at + 64] = b"\xff" * 64
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [truncated, emptied, git_lfs_pointer, garbled], ids=lambda damage: damage.__name__)
def test_a_damaged_shard_is_named(sharded: Path, damage: Callable[[Path], None]) -> None:
    damage(sharded / SECOND)
    assert_tells(refusal(sharded), sharded / SECOND, "convert the checkpoint to safetensors")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    assert_tells(refusal(sharded), sharded / SECOND, "missing", "download it again")


def test_a_tensor_that_its_shard_does_not_hold_is_named_with_the_shard(sharded: Path) -> None:
    tensors = torch.load(sharded / SECOND)
    name = min(tensors)
    torch.save({other: tensor for other, tensor in tensors.items() if other != name}, sharded / SECOND)
    assert_tells(refusal(sharded), sharded / SECOND, name, pickles.INDEX, "missing")


def test_a_tensor_in_two_shards_is_refused_rather_than_one_of_them_taken(sharded: Path) -> None:
    pickles.change(sharded / pickles.shard_name(3, 3), torch.load(sharded / SECOND))
    assert_tells(refusal(sharded), SECOND, pickles.shard_name(3, 3))


@pytest.mark.parametrize("file", ["../pytorch_model.bin", "/etc/passwd", "sub/pytorch_model.bin"])
def test_an_index_cannot_make_the_export_read_files_elsewhere(sharded: Path, file: str) -> None:
    (sharded / pickles.INDEX).write_text(json.dumps({"weight_map": {NORM: file}}))
    assert_tells(refusal(sharded), sharded / pickles.INDEX, file)


def test_of_a_pickle_only_the_tensor_that_is_read_takes_memory(pickled: Path) -> None:
    size = 1 << 29
    torch.save({NORM: torch.ones(64), "large": torch.empty(size // 4)}, pickled / pickles.SINGLE)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    checkpoint = Checkpoint.open(pickled)
    assert checkpoint.tensors["large"].shape == (size // 4,)
    assert torch.equal(checkpoint.read(NORM), torch.ones(64))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < size / 4
