"""A TensorRT network as a program: what the parser made of an ONNX graph, layer by layer, with no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import onnx
import onnx_ir as ir
import torch

from exporter.evaluate.network_layers import LAYERS
from exporter.evaluate.onnx_graph import meaning_of
from exporter.evaluate.program import CannotEvaluate, Compute, Edge, Program, Step, in_order
from exporter.evaluate.tensors import as_torch

Tensor = torch.Tensor
Reader = Callable[[], Tensor]

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "BOOL": torch.bool,
    "INT4": torch.int8,  # in a byte each
    "FP8": torch.float8_e4m3fn,
}
_NOT_HANDED_OUT = {torch.bfloat16, torch.int8, torch.float8_e4m3fn}  # constants whose content the API keeps


def compile_network(
    trt: Any,
    network: Any,
    constants: Mapping[str, Reader],
    owner: object = None,
    plugins: Mapping[str, onnx.NodeProto] | None = None,
) -> Program:
    """A parsed network as a program, mended or not.

    Args:
        trt: the module that the network is of.
        network: its `INetworkDefinition`.
        constants: readers of the ONNX initializers by name. TensorRT's Python API does not hand out bfloat16,
            int4 and fp8 weights: those are read here, by the name and shape of the constant layer.
        owner: what must live as long as the network's weights do (the parser).
        plugins: the ONNX nodes that plugins compute, by name; their layers hand out nothing of what they mean.

    Raises:
        CannotEvaluate: a layer or an attribute value without a meaning here.
    """
    inputs = tuple(_edge(network.get_input(i)) for i in range(network.num_inputs))
    outputs = tuple(network.get_output(i).name for i in range(network.num_outputs))
    readers: dict[str, Reader] = {}
    steps = []
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        kind = trt.ILayer.type.__get__(layer).name  # a cast layer can have a `type` of its own
        if kind == "ATTENTION_INPUT":
            continue  # the attention is read whole, where it ends
        if kind == "PLUGIN_V3":
            steps.append(_step(layer, kind, partial(_plugin, plugins or {})))
            continue
        if kind not in LAYERS:
            raise CannotEvaluate(f"layer type {kind} of {layer.name}")
        class_name, build = LAYERS[kind]
        layer.__class__ = getattr(trt, class_name)  # the only way to a layer's attributes
        if kind == "CONSTANT":
            readers[layer.get_output(0).name] = _constant(layer, constants)
        else:
            steps.append(_step(layer, kind, build))
        layer.__class__ = trt.ILayer
    known = [*readers, *(edge.name for edge in inputs)]
    return Program(inputs, readers, in_order(steps, known, outputs), outputs, (network, owner))


def _step(layer: Any, kind: str, build: Callable[[Any], Compute]) -> Step:
    sources = _attention_inputs(layer.attention) if kind == "ATTENTION_OUTPUT" else _inputs(layer)
    edges = tuple(_edge(layer.get_output(i)) for i in range(layer.num_outputs))
    names = tuple(None if tensor is None else tensor.name for tensor in sources)
    return Step(f"{kind} {layer.name}", names, edges, build(layer))


def _plugin(nodes: Mapping[str, onnx.NodeProto], layer: Any) -> Compute:
    """A plugin's meaning is its node's."""
    node = nodes.get(layer.name)
    if node is None:
        raise CannotEvaluate(f"plugin {layer.name}")
    return meaning_of(ir.serde.deserialize_node(node))[1]


def _inputs(layer: Any) -> Iterator[Any]:
    return (layer.get_input(i) for i in range(layer.num_inputs))


def _attention_inputs(attention: Any) -> list[Any]:
    """Query, key, value, mask or None, lengths or None."""
    return [*(attention.get_input(i) for i in range(3)), attention.mask, getattr(attention, "key_value_lengths", None)]


def _edge(tensor: Any) -> Edge:
    name = tensor.dtype.name
    if name not in _DTYPES:
        raise CannotEvaluate(f"dtype {name} of {tensor.name}")
    return Edge(tensor.name, _DTYPES[name])


def _constant(layer: Any, constants: Mapping[str, Reader]) -> Reader:
    edge, shape = _edge(layer.get_output(0)), tuple(layer.shape)
    if edge.dtype in _NOT_HANDED_OUT:
        return partial(_by_name, edge.dtype, layer.name, shape, constants)
    weights = layer.weights
    return lambda: as_torch(weights).reshape(shape)


def _by_name(dtype: torch.dtype, name: str, shape: tuple[int, ...], constants: Mapping[str, Reader]) -> Tensor:
    if name not in constants:
        raise CannotEvaluate(f"content of the {dtype} constant {name}, which is no initializer of the ONNX graph")
    tensor = constants[name]()
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CannotEvaluate(f"{dtype} constant {name} of shape {shape}: the ONNX graph has {tuple(tensor.shape)}")
    return tensor
