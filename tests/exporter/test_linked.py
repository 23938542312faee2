"""`--weights link`: the bundle has the checkpoint's own files, and removing one of the two leaves the other whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pickles
import pytest
import safetensors_files as by_hand
import torch
from checkpoints import write_checkpoint
from refusals import assert_tells, snapshot

from exporter.evaluate.onnx_graph import read_tensor
from exporter.export import ExportOptions, ExportResult, export
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.manifest import MODEL

SINGLE = "model.safetensors"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
COPIED = ExportOptions(verify=False, fp16_safe=False)


def linked(checkpoint: Path, place: Path, **options: Any) -> ExportResult:
    return export(
        checkpoint, place, ExportOptions(**{"weights": "link", "verify": False, "fp16_safe": False} | options)
    )


def initializers(bundle: Path) -> dict[str, onnx.TensorProto]:
    model = onnx.load(bundle / MODEL, load_external_data=False)
    return {tensor.name: tensor for tensor in model.graph.initializer}


def location(tensor: onnx.TensorProto) -> str | None:
    return next((entry.value for entry in tensor.external_data if entry.key == "location"), None)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("precision", DTYPES)
def test_what_is_as_the_checkpoint_has_it_is_linked_and_the_gate_passes(quick, tmp_path, target, precision) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", dtype=DTYPES[precision])
    bundle = linked(checkpoint, tmp_path / "bundle", target=target, precision=precision, verify=True).bundle
    assert os.path.samefile(bundle / SINGLE, checkpoint / SINGLE) or (bundle / SINGLE).stat().st_nlink == 1
    Bundle.open(bundle).check_hashes()
    places = {name: location(tensor) for name, tensor in initializers(bundle).items()}
    stored = by_hand.read(checkpoint / SINGLE)
    matrices = {name for name, (_, shape, _) in stored.items() if len(shape) > 1}
    assert {name for name, place in places.items() if place == SINGLE} >= matrices
    assert all(places[name] == "model.onnx.data" for name in places if name.endswith(".plus_one"))
    for name, value in ir.load(bundle / MODEL).graph.initializers.items():
        if places[name] == SINGLE:
            assert value.const_value is not None
            found = read_tensor(value.const_value).float().numpy()
            np.testing.assert_array_equal(found, by_hand.float32(stored[name]))


def test_a_linked_bundle_has_the_manifest_that_a_written_one_has(quick, small_checkpoint, tmp_path) -> None:
    ours, other = linked(small_checkpoint, tmp_path / "a"), export(small_checkpoint, tmp_path / "b", COPIED)
    assert ours.manifest.source == other.manifest.source  # the fingerprint too
    assert ours.manifest.graph == other.manifest.graph


def test_shards_are_linked_by_their_names_and_those_without_use_are_not(quick, small_copy: Path, tmp_path) -> None:
    by_hand.shard(small_copy, 3)
    stored = {path.name for path in small_copy.glob("*.safetensors")}
    bundle = linked(small_copy, tmp_path / "bundle").bundle
    places = {location(tensor) for tensor in initializers(bundle).values()} - {None, "model.onnx.data"}
    assert places == {path.name for path in bundle.glob("*.safetensors")} <= stored
    assert places == {name for name in Bundle.open(bundle).manifest.files if name.endswith(".safetensors")}


def test_a_snapshot_of_the_hub_whose_files_are_symbolic_links_is_linked_to_the_files(
    quick, small_copy: Path, tmp_path
) -> None:
    (tmp_path / "blobs").mkdir()
    shutil.move(small_copy / SINGLE, tmp_path / "blobs" / "abc")
    (small_copy / SINGLE).symlink_to("../blobs/abc")
    bundle = linked(small_copy, tmp_path / "bundle").bundle
    assert not (bundle / SINGLE).is_symlink()
    Bundle.open(bundle).check_hashes()


def test_replacing_or_deleting_a_linked_bundle_leaves_the_checkpoint(quick, small_copy: Path, tmp_path) -> None:
    before = snapshot(small_copy)
    for _ in range(2):
        linked(small_copy, tmp_path / "bundle", force=True)
        assert snapshot(small_copy) == before
    export(small_copy, tmp_path / "bundle", ExportOptions(verify=False, force=True))
    assert snapshot(small_copy) == before
    linked(small_copy, tmp_path / "other")
    shutil.rmtree(tmp_path / "other")
    assert snapshot(small_copy) == before


def refusing(number: int) -> Callable[..., None]:
    def link(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    return link


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM])
def test_a_file_system_that_cannot_link_is_told_and_nothing_is_left(
    quick, small_checkpoint, tmp_path, monkeypatch, number
) -> None:
    monkeypatch.setattr("exporter.linked._cloned", lambda *_: False)
    monkeypatch.setattr(os, "link", refusing(number))
    (tmp_path / "place").mkdir()
    with pytest.raises(UserError) as refused:
        linked(small_checkpoint, tmp_path / "place" / "bundle")
    assert_tells(refused.value, small_checkpoint / SINGLE, tmp_path / "place", "--weights copy")
    assert snapshot(tmp_path / "place") == {}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"precision": "bf16"}, "--precision fp32"),
        ({"precision": "int4"}, "--precision fp32"),
        ({"target": "tensorrt", "precision": "fp8"}, "--precision fp32"),
        ({"weights": "move"}, "copy, link"),
    ],
)
def test_where_nothing_could_be_linked_the_precision_that_can_is_named(
    untraced, small_checkpoint, tmp_path, options, told
) -> None:
    with pytest.raises(UserError) as refused:
        linked(small_checkpoint, tmp_path / "bundle", **options)
    assert_tells(refused.value, told)


def test_pickles_are_not_linked(untraced, small_copy: Path, tmp_path) -> None:
    pickles.repickle(small_copy)
    with pytest.raises(UserError) as refused:
        linked(small_copy, tmp_path / "bundle")
    assert_tells(refused.value, small_copy, "safetensors")


def test_a_weight_that_is_not_finite_is_refused_as_in_a_copy(quick, small_copy: Path, tmp_path) -> None:
    tensors, name = by_hand.read(small_copy / SINGLE), "model.layers.0.mlp.up_proj.weight"
    bad = by_hand.float32(tensors[name]).copy()
    bad[5, 5] = np.nan
    by_hand.write(small_copy / SINGLE, tensors | {name: by_hand.from_float32(bad)})
    with pytest.raises(UserError) as refused:
        linked(small_copy, tmp_path / "bundle")
    assert_tells(refused.value, small_copy / SINGLE, name, "NaN or infinity")
    assert not (tmp_path / "bundle").exists()


def test_a_linked_file_that_is_edited_through_the_checkpoint_is_found(quick, small_copy: Path, tmp_path) -> None:
    bundle = linked(small_copy, tmp_path / "bundle").bundle
    if (bundle / SINGLE).stat().st_nlink == 1:
        pytest.skip("the file system shares content, not files")
    with (small_copy / SINGLE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert Bundle.open(bundle).changed_files() == [SINGLE]
