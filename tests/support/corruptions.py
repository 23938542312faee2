"""One-line bugs, written into a good bundle: what an exporter that is wrong would produce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from runtime.bundle import describe_files
from runtime.errors import CheckFailed
from runtime.manifest import Manifest


def passes_gate(bundle: Path, checkpoint: Path) -> bool:
    """Whether the gate passes; a graph may be so wrong that onnxruntime itself refuses it."""
    from exporter.verify import verify  # with torch, which most who corrupt a bundle do not need

    try:
        return verify(bundle, checkpoint).passed
    except CheckFailed:
        return False


def redescribe(directory: Path) -> None:
    """Record a bundle's files as they are now, as an exporter with a bug would."""
    replace(Manifest.load(directory), files=describe_files(directory)).save(directory)


def corrupt(directory: Path, corruption: Callable[[onnx.ModelProto], None]) -> None:
    """Change a bundle's graph and make its manifest agree."""
    path = directory / "model.onnx"
    model = onnx.load(path)  # weights too
    corruption(model)
    (directory / "model.onnx.data").unlink()
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data")
    redescribe(directory)


def _initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _set(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    _initializer(model, name).CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value, np.float32), name))


def _get(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(_initializer(model, name))


def drop_plus_one(model: onnx.ModelProto) -> None:
    """One norm of one layer keeps the stored weight."""
    name = "model.layers.1.post_attention_layernorm.weight.plus_one"
    _set(model, name, _get(model, name) - 1)


def rotate_all_dimensions(model: onnx.ModelProto) -> None:
    """The rotary tables span the whole head, as if the factor were 1."""
    width, positions = 2 * _get(model, "rope.cos").shape[1], len(_get(model, "rope.cos"))
    frequencies = 10000.0 ** -(np.arange(0, 2 * width, 2) / (2 * width))
    angles = np.outer(np.arange(positions), frequencies)
    _set(model, "rope.cos", np.cos(angles))
    _set(model, "rope.sin", np.sin(angles))


def wrong_epsilon(model: onnx.ModelProto) -> None:
    """1e-6 for 1e-5: what a reader of `rms_norm_eps` takes for `norm_eps`."""
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "LayerNormalization" and attribute.name == "epsilon":
                attribute.f = 1e-6


def causal_off_by_one(model: onnx.ModelProto) -> None:
    """Every row's last valid key is taken to be one earlier."""
    attention = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    producers = {output: node for node in model.graph.node for output in node.output}
    subtract = producers[producers[attention.input[5]].input[0]]
    model.graph.initializer.append(numpy_helper.from_array(np.array(2), "two"))
    subtract_two = onnx.helper.make_node("Sub", [subtract.input[0], "two"], ["last_key_but_one"])
    producers[attention.input[5]].input[0] = subtract_two.output[0]
    model.graph.node.insert(list(model.graph.node).index(subtract) + 1, subtract_two)


ALL = (drop_plus_one, rotate_all_dimensions, wrong_epsilon, causal_off_by_one)
