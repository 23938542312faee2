"""Cached graphs whose export added to their inputs and outputs; the oracle is the graph without them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from corruptions import redescribe
from onnx import TensorProto, helper, numpy_helper

from runtime import load
from runtime.bundle import Bundle
from runtime.contract import hidden_states_name
from runtime.engines import choose_engine
from runtime.errors import UserError
from runtime.golden import selftest
from runtime.manifest import Manifest, TensorSpec
from runtime.ort_session import OrtSession
from runtime.steps import Step, contract_of

ROWS = ("batch", "sequence")


def change(directory: Path, edit: Callable[[onnx.ModelProto, Manifest], Manifest]) -> Path:
    model = onnx.load(directory / "model.onnx")
    edit(model, Manifest.load(directory)).save(directory)
    onnx.save(model, directory / "model.onnx")
    redescribe(directory)
    return directory


def take_embeddings(directory: Path) -> Path:
    """`inputs_embeds` in place of `input_ids`, and the table to look them up."""

    def edit(model: onnx.ModelProto, manifest: Manifest) -> Manifest:
        graph = model.graph
        gather = next(node for node in graph.node if "input_ids" in node.input and node.op_type == "Gather")
        weights = next(tensor for tensor in graph.initializer if tensor.name == gather.input[0])
        table = numpy_helper.to_array(weights)
        np.save(directory / "embed_tokens.npy", table)
        names = {"input_ids": "inputs_embeds", gather.output[0]: "inputs_embeds"}
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
        graph.node.remove(gather)
        graph.initializer.remove(weights)
        shape = (*ROWS, table.shape[1])
        graph.input[0].CopyFrom(helper.make_tensor_value_info("inputs_embeds", TensorProto.FLOAT, shape))
        spec = TensorSpec(name="inputs_embeds", dtype="float32", shape=shape)
        inputs = (spec, *manifest.graph.inputs[1:])
        return replace(manifest, graph=replace(manifest.graph, inputs=inputs))

    return change(directory, edit)


def take_positions(directory: Path) -> Path:
    """`position_ids`, whose largest is added to the row's logits: what was fed can be read off."""

    def edit(model: onnx.ModelProto, manifest: Manifest) -> Manifest:
        graph = model.graph
        next(node for node in graph.node if node.output[0] == "logits").output[0] = "bare"
        graph.initializer.append(numpy_helper.from_array(np.array([1, 2]), "axes"))
        graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
        graph.node.extend(
            [
                helper.make_node("ReduceMax", ["position_ids", "axis"], ["largest"], keepdims=0),
                helper.make_node("Cast", ["largest"], ["number"], to=TensorProto.FLOAT),
                helper.make_node("Unsqueeze", ["number", "axes"], ["column"]),
                helper.make_node("Add", ["bare", "column"], ["logits"]),
            ]
        )
        graph.input.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, ROWS))
        spec = TensorSpec(name="position_ids", dtype="int64", shape=ROWS)
        return replace(manifest, graph=replace(manifest.graph, inputs=(*manifest.graph.inputs, spec)))

    return change(directory, edit)


def give_hidden_states(directory: Path) -> Path:
    """An output that sessions have no use for, before the others."""

    def edit(model: onnx.ModelProto, manifest: Manifest) -> Manifest:
        name, width = hidden_states_name(0), 64
        embedded = next(node for node in model.graph.node if node.op_type == "Gather").output[0]
        model.graph.node.append(helper.make_node("Identity", [embedded], [name]))
        info = helper.make_tensor_value_info(name, TensorProto.FLOAT, (*ROWS, width))
        model.graph.output.insert(0, info)
        spec = TensorSpec(name=name, dtype="float32", shape=(*ROWS, width))
        return replace(manifest, graph=replace(manifest.graph, outputs=(spec, *manifest.graph.outputs)))

    return change(directory, edit)


@pytest.mark.parametrize("edit", [take_embeddings, give_hidden_states])
def test_text_and_proof_are_those_of_the_plain_graph(
    edit: Callable[[Path], Path], bundle_dir: Path, bundle_copy: Path
) -> None:
    """Prompts, golden cases and results are token ids all the same."""
    expected = load(bundle_dir).generate(["Our solar", "Mars"], max_new_tokens=8).sequences
    assert load(edit(bundle_copy)).generate(["Our solar", "Mars"], max_new_tokens=8).sequences == expected
    assert selftest(bundle_copy).passed


def test_positions_go_on_from_each_rows_past(session: OrtSession, bundle_copy: Path) -> None:
    other = OrtSession(Bundle.open(take_positions(bundle_copy)), slots=4, capacity=48)
    prompts, lengths = np.array([[5, 6, 7, 8], [9, 10, 11, 0]]), np.array([4, 3])
    for tokens, new, past, largest in (
        (prompts, lengths, lengths * 0, [3, 3]),  # the padding counts on, and nobody looks at it
        (prompts[:, :1], lengths // lengths, lengths, [4, 3]),
    ):
        plain = session.step(tokens, new, past)
        np.testing.assert_allclose(other.step(tokens, new, past) - plain, plain * 0 + np.reshape(largest, (2, 1, 1)),
                                   atol=1e-4)  # fmt: skip


def test_what_is_fed_follows_the_manifest(bundle_dir: Path, bundle_copy: Path) -> None:
    step = Step(np.array([[5, 6], [7, 0]]), np.array([2, 1]), np.array([0, 9]), np.array([0, 1]), 1)
    plain = contract_of(Bundle.open(bundle_dir)).feeds(step)
    assert set(plain) == {"input_ids", "attention_mask", "logits_to_keep"}
    feeds = contract_of(Bundle.open(take_embeddings(take_positions(bundle_copy)))).feeds(step)
    assert set(feeds) == {"inputs_embeds", "attention_mask", "logits_to_keep", "position_ids"}
    assert feeds["position_ids"].tolist() == [[0, 1], [9, 10]]
    table = np.load(bundle_copy / "embed_tokens.npy")
    np.testing.assert_array_equal(feeds["inputs_embeds"], table[step.tokens])
    assert all(array.flags.c_contiguous for array in feeds.values())


def test_an_engine_is_not_taken_for_inputs_that_it_is_not_fed(bundle_copy: Path) -> None:
    bundle = Bundle.open(take_positions(bundle_copy))
    bundle = replace(bundle, manifest=replace(bundle.manifest, target="tensorrt"))
    with pytest.raises(UserError, match="takes position_ids, which engines are not fed; use --backend onnxruntime"):
        choose_engine(bundle)
