"""Weights reach the bundle's data file value by value, one in memory at a time."""

from __future__ import annotations

import errno
import json
import weakref
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import safetensors_files as by_hand
import torch
from checkpoints import SMALL
from onnx import numpy_helper
from refusals import assert_tells
from transformers import NemotronConfig, NemotronForCausalLM

from exporter import tensor_slices
from exporter.checkpoint import Checkpoint
from exporter.origin import derive
from exporter.parameters import check_tensors, expected_shapes, weight_source
from exporter.tasks import TASKS
from exporter.weights import _WORKERS, weight_bytes, write_weights
from runtime.errors import UserError

NORM, PROJECTION, EMBEDDING = "model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
SHAPES = {NORM: (64,), PROJECTION: (96, 64), EMBEDDING: (97, 64)}


TEXT = TASKS["text-generation"]


@pytest.fixture
def graph_model() -> ir.Model:
    """A graph of four weights, of which two are derived, one large constant and one small."""
    graph = ir.Graph([], [], nodes=[], name="g", opset_imports={"": 21})
    for name, shape in SHAPES.items():
        graph.initializers.add(ir.val(name, dtype=ir.DataType.FLOAT, shape=shape))
    derive(graph.initializers[NORM], "plus_one", plus_one=True)
    derive(graph.initializers[PROJECTION], "transposed", transposed=True)
    for name, length in (("table", 300), ("one", 1)):
        constant = ir.tensor(np.arange(length, dtype=np.float32), name=name)
        graph.initializers.add(ir.val(name, const_value=constant))
    return ir.Model(graph, ir_version=10)


@pytest.fixture
def bf16_checkpoint(small_copy: Path) -> Path:
    tensors = by_hand.read(small_copy / "model.safetensors")
    cut = {name: by_hand.from_float32(by_hand.float32(tensor), "BF16") for name, tensor in tensors.items()}
    by_hand.write(small_copy / "model.safetensors", cut)
    return small_copy


def save(model: ir.Model, checkpoint: Path, target: Path) -> onnx.ModelProto:
    target.mkdir()
    write_weights(model, Checkpoint.open(checkpoint), target / "model.onnx.data")
    ir.save(model, target / "model.onnx")
    return onnx.load(target / "model.onnx", load_external_data=False)


@pytest.mark.parametrize("stored", ["small_copy", "bf16_checkpoint"])
def test_every_weight_is_the_checkpoints_in_fp32_with_its_recipe_done(graph_model, stored, tmp_path, request) -> None:
    checkpoint = request.getfixturevalue(stored)
    save(graph_model, checkpoint, tmp_path / "b")
    loaded = onnx.load(tmp_path / "b" / "model.onnx")
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in loaded.graph.initializer}
    source = {n: by_hand.float32(t) for n, t in by_hand.read(checkpoint / "model.safetensors").items()}
    expected = {
        **{name: source[name] for name in SHAPES},
        f"{NORM}.plus_one": source[NORM] + np.float32(1),
        f"{PROJECTION}.transposed": source[PROJECTION].T,
        "table": np.arange(300, dtype=np.float32),
        "one": np.zeros(1, np.float32),
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_weights_lie_on_pages_in_one_file_without_overlap(graph_model, small_copy: Path, tmp_path: Path) -> None:
    proto = save(graph_model, small_copy, tmp_path / "b")
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in proto.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    assert "one" not in places  # small constants stay where graph tools see them
    assert len(places) == len(SHAPES) + 2 + 1
    assert {place["location"] for place in places.values()} == {"model.onnx.data"}
    ranges = sorted((int(place["offset"]), int(place["length"])) for place in places.values())
    assert all(offset % 4096 == 0 for offset, _ in ranges)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(ranges))
    assert sum(ranges[-1]) == (tmp_path / "b" / "model.onnx.data").stat().st_size


def test_the_graph_file_holds_no_weight(graph_model, small_copy: Path, tmp_path: Path) -> None:
    save(graph_model, small_copy, tmp_path / "b")
    assert (tmp_path / "b" / "model.onnx").stat().st_size < 4096


def test_the_bytes_that_are_announced_are_those_of_the_weights(graph_model) -> None:
    elements = 64 + 64 + 2 * 96 * 64 + 97 * 64
    assert weight_bytes(graph_model) == 4 * elements


def test_progress_counts_up_to_the_last_byte(graph_model, small_copy: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    total = weight_bytes(graph_model)
    write_weights(graph_model, Checkpoint.open(small_copy), tmp_path / "data", progress=seen.append)
    assert seen == sorted(seen)
    assert len(seen) >= len(SHAPES) + 1
    assert seen[-1] == total + 4 * 300


def test_few_slices_are_in_memory_however_many_a_tensor_has(graph_model, small_copy, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tensor_slices, "SLICE_BYTES", 1)
    monkeypatch.setattr(tensor_slices, "WIDE_BYTES", 1)
    monkeypatch.setattr(tensor_slices, "EVEN", 1)
    read, alive, most = Checkpoint.slices, [], [0]

    def watched(self: Checkpoint, name: str, *, wide: bool) -> Iterator[tuple[int, torch.Tensor]]:
        for start, rows in read(self, name, wide=wide):
            alive.append(weakref.ref(rows))
            most[0] = max(most[0], sum(reference() is not None for reference in alive))
            yield start, rows

    monkeypatch.setattr(Checkpoint, "slices", watched)
    write_weights(graph_model, Checkpoint.open(small_copy), tmp_path / "data")
    assert len(alive) == 64 + 96 + 97  # a tensor that two initializers come from is read once
    assert most[0] <= _WORKERS + 2


def test_a_missing_tensor_stops_the_export(graph_model, small_copy: Path, tmp_path: Path) -> None:
    tensors = by_hand.read(small_copy / "model.safetensors")
    del tensors[PROJECTION]
    by_hand.write(small_copy / "model.safetensors", tensors)
    with pytest.raises(UserError) as refused:
        write_weights(graph_model, Checkpoint.open(small_copy), tmp_path / "data")
    assert_tells(refused.value, PROJECTION, "missing")


def test_a_derived_weight_is_checked_against_the_shape_it_is_derived_from(small_copy: Path, tmp_path: Path) -> None:
    graph = ir.Graph([], [], nodes=[], name="g", opset_imports={"": 21})
    graph.initializers.add(ir.val(PROJECTION, dtype=ir.DataType.FLOAT, shape=(64, 96)))  # the other way round
    derive(graph.initializers[PROJECTION], "transposed", transposed=True)
    del graph.initializers[PROJECTION]
    with pytest.raises(UserError) as refused:
        write_weights(ir.Model(graph, ir_version=10), Checkpoint.open(small_copy), tmp_path / "data")
    assert_tells(refused.value, PROJECTION, "[96, 64]", "[64, 96]")


def test_a_disk_that_is_full_is_not_taken_for_success(graph_model, small_copy: Path, monkeypatch) -> None:
    full = Path("/dev/full")  # every write to it fails as on a full disk
    if not full.exists():
        pytest.skip("the system has no /dev/full")
    with pytest.raises(OSError, match="space") as raised:
        write_weights(graph_model, Checkpoint.open(small_copy), full)
    assert raised.value.errno == errno.ENOSPC


def test_the_file_is_closed_when_a_write_fails(graph_model, small_copy: Path, tmp_path: Path, monkeypatch) -> None:
    opened: list[BinaryIO] = []
    original = Path.open

    def limited(path: Path, *args: Any, **options: Any) -> Any:
        file = original(path, *args, **options)
        if path.name == "data":
            opened.append(file)
        return file

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "open", limited)
    with pytest.raises(KeyboardInterrupt):
        write_weights(graph_model, Checkpoint.open(small_copy), tmp_path / "data", progress=stop)
    assert [file.closed for file in opened] == [True]


def spec_values(path: Path, **values: object) -> None:
    """Change the configuration of a checkpoint."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("options", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_the_weights_that_are_asked_for_are_those_of_transformers_model(small_copy: Path, options) -> None:
    spec_values(small_copy, **options)
    model = NemotronForCausalLM(NemotronConfig(**SMALL, **options))  # in memory, not on the meta device
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert expected_shapes(Checkpoint.open(small_copy).spec, TEXT) == theirs
    assert ("lm_head.weight" in theirs) == (not options.get("tie_word_embeddings"))


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", EMBEDDING, NORM, "model.norm.bias", "model.layers.1.self_attn.o_proj.weight"],
)
def test_any_tensor_that_is_missing_or_misshapen_is_found_before_work(small_copy: Path, name: str) -> None:
    file = small_copy / "model.safetensors"
    tensors = by_hand.read(file)
    check_tensors(expected_shapes(Checkpoint.open(small_copy).spec, TEXT), Checkpoint.open(small_copy), TEXT)
    dtype, shape, content = tensors.pop(name)
    for replaced, named in (({}, "missing"), ({name: (dtype, [*shape, 1], content)}, str([*shape, 1]))):
        by_hand.write(file, tensors | replaced)
        checkpoint = Checkpoint.open(small_copy)
        with pytest.raises(UserError) as refused:
            check_tensors(expected_shapes(checkpoint.spec, TEXT), checkpoint, TEXT)
        assert_tells(refused.value, small_copy, name, named)


@pytest.mark.parametrize("stored", ["lm_head.weight", EMBEDDING])
def test_tied_embeddings_are_found_under_either_name(small_copy: Path, stored: str) -> None:
    file = small_copy / "model.safetensors"
    tensors = by_hand.read(file)
    other = ({"lm_head.weight", EMBEDDING} - {stored}).pop()
    del tensors[other]
    by_hand.write(file, tensors)
    untied = Checkpoint.open(small_copy)
    assert weight_source(other, untied) == other  # an untied model lacks a tensor
    spec_values(small_copy, tie_word_embeddings=True)
    tied = Checkpoint.open(small_copy)
    assert weight_source(other, tied) == weight_source(stored, tied) == stored
    assert weight_source(NORM, tied) == NORM
    check_tensors(expected_shapes(tied.spec, TEXT), tied, TEXT)


def test_weights_that_the_configuration_has_no_place_for_are_not_dropped_silently(small_copy: Path) -> None:
    """Otherwise a config.json with fewer layers would export another, shallower model."""
    config = json.loads((small_copy / "config.json").read_text())
    (small_copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    checkpoint = Checkpoint.open(small_copy)
    with pytest.raises(UserError) as refused:
        check_tensors(expected_shapes(checkpoint.spec, TEXT), checkpoint, TEXT)
    assert_tells(refused.value, "model.layers.1.", "have no place")


def test_the_frequencies_that_older_checkpoints_store_are_no_obstacle(small_copy: Path) -> None:
    tensors = by_hand.read(small_copy / "model.safetensors")
    buffer = by_hand.from_float32(np.ones(8, np.float32), "F32")
    by_hand.write(small_copy / "model.safetensors", {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": buffer})
    checkpoint = Checkpoint.open(small_copy)
    check_tensors(expected_shapes(checkpoint.spec, TEXT), checkpoint, TEXT)
