"""A checkpoint's tensors are read bit for bit, one at a time; a damaged one is named and refused."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors_files as by_hand
import torch
from refusals import assert_tells

from exporter.checkpoint import Checkpoint
from runtime.errors import UserError

NORM = "model.norm.weight"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SECOND = "model-00002-of-00003.safetensors"


def refusal(path: Path) -> UserError:
    with pytest.raises(UserError) as refused:
        Checkpoint.open(path)
    return refused.value


def change(path: Path, name: str, tensor: by_hand.Stored | None) -> None:
    """Replace a tensor of a single-file checkpoint, or take it out."""
    tensors = by_hand.read(path / SINGLE)
    del tensors[name]
    by_hand.write(path / SINGLE, tensors | ({name: tensor} if tensor else {}))


@pytest.fixture
def sharded(small_copy: Path) -> Path:
    by_hand.shard(small_copy, 3)
    return small_copy


def test_a_path_that_is_no_directory_is_named_and_downloading_suggested(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "absent", tmp_path / "file", Path("nvidia/Minitron-4B-Base")):
        assert_tells(refusal(path), path, "is not a directory", "hf download")


def test_a_checkpoint_of_another_architecture_is_refused_before_its_weights_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert_tells(refusal(tmp_path), tmp_path / "config.json", "'llama'")


def test_a_checkpoint_without_weights_is_refused_with_the_names_that_were_looked_for(small_copy: Path) -> None:
    (small_copy / SINGLE).rename(small_copy / "weights.safetensors")
    assert_tells(refusal(small_copy), small_copy, SINGLE, INDEX, "pytorch_model.bin", "download the checkpoint again")


def test_opening_lists_every_tensor_with_its_shape_and_dtype(tiny_checkpoint: Path) -> None:
    stored = by_hand.read(tiny_checkpoint / SINGLE)
    opened = Checkpoint.open(tiny_checkpoint).tensors
    assert {name: (info.dtype, list(info.shape)) for name, info in opened.items()} == {
        name: (dtype, shape) for name, (dtype, shape, _) in stored.items()
    }


def test_opening_reads_headers_alone(small_copy: Path) -> None:
    size = 1 << 30  # of holes: the file takes no place on the disk
    header = json.dumps({NORM: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    (small_copy / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(small_copy / SINGLE, 8 + len(header) + size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    checkpoint = Checkpoint.open(small_copy)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert checkpoint.tensors[NORM].shape == (size // 4,)
    assert grown < size / 4


def test_a_file_that_cannot_be_mapped_is_refused_with_the_reason(small_copy: Path, monkeypatch) -> None:
    def mapped(*args: object, **options: object) -> None:
        raise RuntimeError("unable to mmap 68719476844 bytes from file: Cannot allocate memory (12)")

    monkeypatch.setattr("safetensors.safe_open", mapped)
    assert_tells(refusal(small_copy), small_copy / SINGLE, "Cannot allocate memory", "free memory")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_tensor_is_read_as_it_is_stored(small_copy: Path, dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    stored = by_hand.from_float32(values, dtype)
    change(small_copy, NORM, stored)
    tensor = Checkpoint.open(small_copy).read(NORM)
    assert tensor.dtype == {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    np.testing.assert_array_equal(tensor.float().numpy(), by_hand.float32(stored))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(small_copy: Path, value: float, dtype: str) -> None:
    values = np.zeros(64, np.float32)
    values[-1] = value
    change(small_copy, NORM, by_hand.from_float32(values, dtype))
    with pytest.raises(UserError) as refused:
        Checkpoint.open(small_copy).read(NORM)
    assert_tells(refused.value, small_copy / SINGLE, NORM, "NaN or infinity")


def test_a_quantized_weight_is_refused_with_the_dtypes_that_are_known(small_copy: Path) -> None:
    change(small_copy, NORM, ("I8", [64], bytes(64)))
    assert_tells(refusal(small_copy), small_copy / SINGLE, NORM, "I8", "F32, F16, BF16")


def test_a_missing_tensor_is_refused_by_name(small_copy: Path) -> None:
    change(small_copy, NORM, None)
    checkpoint = Checkpoint.open(small_copy)
    with pytest.raises(UserError) as refused:
        checkpoint.require(NORM, (64,))
    assert_tells(refused.value, small_copy, NORM, "missing", "download it again")


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(small_copy: Path) -> None:
    change(small_copy, NORM, by_hand.from_float32(np.ones((8, 8))))
    checkpoint = Checkpoint.open(small_copy)
    checkpoint.require(NORM, (8, 8))
    with pytest.raises(UserError) as refused:
        checkpoint.require(NORM, (64,))  # as many elements, and yet another tensor
    assert_tells(refused.value, small_copy / SINGLE, NORM, "[8, 8]", "[64]")


def cut_data(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def cut_header(path: Path) -> None:
    os.truncate(path, 100)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def git_lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


@pytest.mark.parametrize("damage", [cut_data, cut_header, emptied, git_lfs_pointer], ids=lambda damage: damage.__name__)
def test_a_truncated_shard_is_refused_when_it_is_opened(sharded: Path, damage: Callable[[Path], None]) -> None:
    damage(sharded / SECOND)
    assert_tells(refusal(sharded), sharded / SECOND, "truncated")


def test_a_file_that_is_cut_after_it_was_opened_is_refused_too(small_copy: Path) -> None:
    checkpoint = Checkpoint.open(small_copy)
    cut_data(small_copy / SINGLE)
    with pytest.raises(UserError) as refused:
        checkpoint.read(NORM)
    assert_tells(refused.value, small_copy / SINGLE, "truncated")


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    assert_tells(refusal(sharded), sharded / SECOND, "missing", "download it again")


def test_a_tensor_that_its_shard_does_not_hold_is_named_with_the_shard(sharded: Path) -> None:
    tensors = by_hand.read(sharded / SECOND)
    first, second = sorted(tensors)[:2]
    by_hand.write(sharded / SECOND, {name: t for name, t in tensors.items() if name not in (first, second)})
    assert_tells(refusal(sharded), sharded / SECOND, first, "missing")


def test_a_tensor_in_two_shards_is_refused_rather_than_one_of_them_taken(sharded: Path) -> None:
    tensors = by_hand.read(sharded / SECOND)
    other = sharded / "model-00003-of-00003.safetensors"
    name = sorted(tensors)[0]
    by_hand.write(other, by_hand.read(other) | {name: tensors[name]})
    assert_tells(refusal(sharded), name, SECOND, other.name)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', '{"weight_map": null}', '{"weight_map": {"a": 1}}'],
)
def test_a_damaged_index_is_named(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert_tells(refusal(sharded), sharded / INDEX, "download it again")


def test_an_index_that_names_a_tensor_twice_is_refused_rather_than_the_last_taken(sharded: Path) -> None:
    content = (sharded / INDEX).read_text()
    twice = content.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "model-00003-of-00003.safetensors", ')
    (sharded / INDEX).write_text(twice)
    assert_tells(refusal(sharded), sharded / INDEX, NORM, "twice")


def lying(**fields: object) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[NORM] = header[NORM] | fields

    change.__name__ = ", ".join(f"{name} {value}" for name, value in fields.items())
    return change


@pytest.mark.parametrize(
    "lie",
    [
        *(lying(shape=[63]), lying(shape=[-64]), lying(dtype="F16"), lying(dtype="F99"), lying(data_offsets=[0])),
        *(lying(data_offsets=[0, 4]), lying(data_offsets=[4, 260]), lying(data_offsets=[1 << 40, (1 << 40) + 256])),
        *(lying(data_offsets=[-4, 252]), lying(data_offsets="all"), lambda header: header.pop(NORM)),
    ],
    ids=lambda lie: lie.__name__,
)
def test_a_header_that_lies_about_places_or_sizes_is_refused(small_copy: Path, lie) -> None:
    """Overlaps, holes, places beyond the end, sizes that are not those of the shapes."""
    rewrite_header(small_copy / SINGLE, lambda text: change_json(text, lie))
    assert_tells(refusal(small_copy), small_copy / SINGLE, "damaged or truncated")


def test_a_header_that_names_a_tensor_twice_is_refused_rather_than_the_last_taken(small_copy: Path) -> None:
    def twice(text: str) -> str:
        entry = json.dumps({NORM: json.loads(text)[NORM]})
        return f"{entry[:-1]}, {text[1:]}"

    rewrite_header(small_copy / SINGLE, twice)
    assert_tells(refusal(small_copy), small_copy / SINGLE)


def rewrite_header(file: Path, change: Callable[[str], str]) -> None:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = change(content[8 : 8 + length].decode()).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def change_json(text: str, change: Callable[[dict[str, Any]], None]) -> str:
    header = json.loads(text)
    change(header)
    return json.dumps(header)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_cannot_make_the_export_read_files_elsewhere(sharded: Path, file: str) -> None:
    (sharded / INDEX).write_text(json.dumps({"weight_map": {NORM: file}}))
    assert_tells(refusal(sharded), sharded / INDEX, file)


def test_where_a_single_file_stands_beside_an_index_the_one_that_transformers_reads_is_read(sharded: Path) -> None:
    values = np.arange(64, dtype=np.float32)
    by_hand.write(sharded / SINGLE, {NORM: by_hand.from_float32(values)})
    np.testing.assert_array_equal(Checkpoint.open(sharded).read(NORM).numpy(), values)


def read_all(path: Path) -> str:
    checkpoint = Checkpoint.open(path)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    return checkpoint.fingerprint()


def test_the_fingerprint_is_the_one_that_is_documented(tiny_checkpoint: Path) -> None:
    stored = by_hand.read(tiny_checkpoint / SINGLE)
    assert read_all(tiny_checkpoint) == by_hand.fingerprint(stored, stored)


def test_resharding_or_renaming_the_directory_does_not_change_the_fingerprint(sharded: Path, small_checkpoint) -> None:
    moved = sharded.rename(sharded.with_name("elsewhere"))
    assert read_all(moved) == read_all(small_checkpoint)


@pytest.mark.parametrize("what", ["element", "dtype", "shape", "name"])
def test_any_change_of_a_tensor_changes_the_fingerprint(small_copy: Path, small_checkpoint: Path, what: str) -> None:
    dtype, shape, content = by_hand.read(small_copy / SINGLE)[NORM]
    flipped = bytes([content[0] ^ 1]) + content[1:]
    changed = {
        "element": (NORM, (dtype, shape, flipped)),
        "dtype": (NORM, ("BF16", [128], content)),
        "shape": (NORM, (dtype, [8, 8], content)),
        "name": ("model.norm.weight2", (dtype, shape, content)),
    }
    name, tensor = changed[what]
    change(small_copy, NORM, None)
    by_hand.write(small_copy / SINGLE, by_hand.read(small_copy / SINGLE) | {name: tensor})
    assert read_all(small_copy) != read_all(small_checkpoint)


def test_a_bundle_is_called_after_the_directory_even_from_within_it(small_copy: Path, monkeypatch) -> None:
    monkeypatch.chdir(small_copy)
    assert Checkpoint.open(Path(".")).name == "small"
