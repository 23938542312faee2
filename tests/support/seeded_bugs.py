"""Bugs of one line each in a graph of either target and what a diagnosis should say of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import corruptions
import numpy as np
import onnx
import tensorrt_corruptions
from onnx import numpy_helper

HEAD_DIM = 64  # of the trained checkpoint
ATTENTIONS = ("GroupQueryAttention", "Attention")


@dataclass(frozen=True)
class Bug:
    """A corruption; where its first divergence is, and why."""

    corrupt: Callable[[onnx.ModelProto], None]
    place: str
    cause: str

    @property
    def name(self) -> str:
        return self.corrupt.__name__


def _initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _get(model: onnx.ModelProto, name: str) -> np.ndarray:
    return np.array(numpy_helper.to_array(_initializer(model, name)))


def _set(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    """Replace an initializer's content, in the dtype it has."""
    kept = np.ascontiguousarray(value.astype(_get(model, name).dtype))
    _initializer(model, name).CopyFrom(numpy_helper.from_array(kept, name))


def _attentions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type in ATTENTIONS]


def _for_tensorrt(model: onnx.ModelProto) -> bool:
    return _attentions(model)[0].op_type == "Attention"


def _attribute(node: onnx.NodeProto, name: str) -> onnx.AttributeProto:
    return next(attribute for attribute in node.attribute if attribute.name == name)


def _rope(model: onnx.ModelProto, theta: float, width: int) -> None:
    angles = np.outer(np.arange(len(_get(model, "rope.cos"))), theta ** -(np.arange(0, width, 2) / width))
    _set(model, "rope.cos", np.cos(angles))
    _set(model, "rope.sin", np.sin(angles))


def another_epsilon(model: onnx.ModelProto) -> None:
    corruptions.wrong_epsilon(model)


def one_dropped_in_one_layer(model: onnx.ModelProto) -> None:
    corruptions.drop_plus_one(model)


def one_dropped_in_the_final_norm(model: onnx.ModelProto) -> None:
    _set(model, "model.norm.weight.plus_one", _get(model, "model.norm.weight.plus_one") - 1)


def rotary_width(model: onnx.ModelProto) -> None:
    _rope(model, 10000.0, HEAD_DIM)
    for node in model.graph.node:
        if node.op_type == "RotaryEmbedding":
            _attribute(node, "rotary_embedding_dim").i = HEAD_DIM


def rotary_theta(model: onnx.ModelProto) -> None:
    _rope(model, 123456.0, 2 * _get(model, "rope.cos").shape[1])


def interleaved_rotation(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name in {"rotary_interleaved", "interleaved"}:
                attribute.i = 1


def order_of_kv_heads(model: onnx.ModelProto) -> None:
    for part in ("k_proj", "v_proj"):
        name = f"model.layers.2.self_attn.{part}.weight.transposed"
        columns = _get(model, name)
        _set(model, name, np.concatenate([columns[:, HEAD_DIM:], columns[:, :HEAD_DIM]], 1))


def attention_scale(model: onnx.ModelProto) -> None:
    _attribute(_attentions(model)[3], "scale").f = HEAD_DIM**-1.0


def causal_off_by_one(model: onnx.ModelProto) -> None:
    if _for_tensorrt(model):
        tensorrt_corruptions.lengths_off_by_one(model)
    else:
        corruptions.causal_off_by_one(model)


def relu_for_its_square(model: onnx.ModelProto) -> None:
    square = [node for node in model.graph.node if node.op_type == "Mul" and node.input[0] == node.input[1]][1]
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == square.output[0]:
                node.input[place] = square.input[0]
    model.graph.node.remove(square)


def two_layers_swapped(model: onnx.ModelProto) -> None:
    for tensor in list(model.graph.initializer):
        if tensor.name.startswith("model.layers.1."):
            other = tensor.name.replace("layers.1.", "layers.2.")
            here, there = _get(model, tensor.name), _get(model, other)
            _set(model, tensor.name, there)
            _set(model, other, here)


def one_overflowing_weight(model: onnx.ModelProto) -> None:
    name = "model.layers.2.mlp.up_proj.weight.transposed"
    matrix = _get(model, name)
    matrix[12, 345] = 6e4 if matrix.dtype == np.float16 else 1e38
    _set(model, name, matrix)


ALL = (
    Bug(another_epsilon, "layer 0", "epsilon"),
    Bug(one_dropped_in_one_layer, "layer 1", "plus_one_not_folded"),
    Bug(one_dropped_in_the_final_norm, "final norm", "plus_one_not_folded"),
    Bug(rotary_width, "layer 0", "rotary_width"),
    Bug(rotary_theta, "layer 0", "rotary_theta"),
    Bug(interleaved_rotation, "layer 0", "rotary_interleaved"),
    Bug(order_of_kv_heads, "layer 2", "head_grouping"),
    Bug(attention_scale, "layer 3", "attention_scale"),
    Bug(causal_off_by_one, "layer 0", "mask"),
    Bug(relu_for_its_square, "layer 1", "activation"),
    Bug(two_layers_swapped, "layer 1", "layer_order"),
    Bug(one_overflowing_weight, "layer 2", "overflow"),
)
