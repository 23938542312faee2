"""One-line bugs in a graph of target `tensorrt`, of any precision: what an exporter that is wrong would produce."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper


def _initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _get(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(_initializer(model, name))


def _set(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    """Replace an initializer's content, in the dtype it has."""
    tensor = _initializer(model, name)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value.astype(_get(model, name).dtype)), name))


def _rope(model: onnx.ModelProto, theta: float, width: int) -> None:
    positions = len(_get(model, "rope.cos"))
    angles = np.outer(np.arange(positions), theta ** -(np.arange(0, width, 2) / width))
    _set(model, "rope.cos", np.cos(angles))
    _set(model, "rope.sin", np.sin(angles))


def _attributes(model: onnx.ModelProto, op_type: str, name: str) -> list[onnx.AttributeProto]:
    nodes = [node for node in model.graph.node if node.op_type == op_type]
    return [attribute for node in nodes for attribute in node.attribute if attribute.name == name]


def drop_plus_one(model: onnx.ModelProto) -> None:
    """One norm of one layer keeps the stored weight."""
    name = "model.layers.1.post_attention_layernorm.weight.plus_one"
    _set(model, name, _get(model, name) - 1)


def wrong_epsilon(model: onnx.ModelProto) -> None:
    """1e-6 for 1e-5: what a reader of `rms_norm_eps` takes for `norm_eps`."""
    for attribute in _attributes(model, "LayerNormalization", "epsilon"):
        attribute.f = 1e-6


def wrong_theta(model: onnx.ModelProto) -> None:
    """The rotary base of another model."""
    _rope(model, 500000.0, 2 * _get(model, "rope.cos").shape[1])


def rotate_all_dimensions(model: onnx.ModelProto) -> None:
    """The rotary tables span the whole head, as if the factor were 1."""
    width = 4 * _get(model, "rope.cos").shape[1]
    _rope(model, 10000.0, width)
    for attribute in _attributes(model, "RotaryEmbedding", "rotary_embedding_dim"):
        attribute.i = width


def unscaled_attention(model: onnx.ModelProto) -> None:
    """The scores are not divided by √head_dim."""
    for attribute in _attributes(model, "Attention", "scale"):
        attribute.f = 1.0


def lengths_off_by_one(model: onnx.ModelProto) -> None:
    """Every query sees one key too many, which nothing has written yet."""
    attention = next(node for node in model.graph.node if node.op_type == "Attention")
    lengths = next(node for node in model.graph.node if attention.input[6] in node.output)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "one_more"))
    at = list(model.graph.node).index(lengths)
    extended = onnx.helper.make_node("Add", [lengths.output[0], "one_more"], ["lengths.extended"])
    model.graph.node.insert(at + 1, extended)
    for node in model.graph.node:
        if node.op_type == "Attention":
            node.input[6] = "lengths.extended"


VISIBLE_IN_16_BIT = (drop_plus_one, wrong_theta, rotate_all_dimensions, unscaled_attention, lengths_off_by_one)
ALL = (*VISIBLE_IN_16_BIT, wrong_epsilon)
