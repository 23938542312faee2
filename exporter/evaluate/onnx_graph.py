"""An ONNX graph as a program, its weights read from the file when they are needed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

import onnx_ir as ir
import torch

from exporter.evaluate.onnx_attributes import Attributes
from exporter.evaluate.onnx_operators import OPERATORS
from exporter.evaluate.program import CannotEvaluate, Compute, Edge, Program, Step, in_order
from exporter.evaluate.tensors import read_tensor
from plugins.split_attention import MERGE_ATTENTION, SPLIT_ATTENTION

_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT4: torch.int8,  # in a byte each
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
}
# The input whose dtype is that of the outputs, where it is not the first.
_TYPED_BY = {"Where": 1, "DequantizeLinear": 1, "GatherBlockQuantized": 2}


_BOOLEAN = {"Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor", "Not"}


def load_graph(path: Path) -> Program:
    """An ONNX file as a program; weights are read from the file, mapped into memory, when a step needs them."""
    return compile_graph(ir.load(path))


def compile_graph(model: ir.Model) -> Program:
    """An ONNX model as a program.

    Raises:
        CannotEvaluate: an operator, attribute or dtype without a meaning here, or one declared against ONNX's rules.
    """
    graph = model.graph
    dtypes = {_name(value): _dtype(value) for value in [*graph.inputs, *graph.initializers.values()]}
    constants = {
        name: partial(read_tensor, cast(ir.TensorProtocol, value.const_value))
        for name, value in graph.initializers.items()
    }
    steps = []
    for node in graph:
        label, compute = meaning_of(node)
        edges = tuple(_edge(value, _result_dtype(node, place, dtypes)) for place, value in enumerate(node.outputs))
        dtypes |= {edge.name: edge.dtype for edge in edges}
        inputs = tuple(None if value is None else _name(value) for value in node.inputs)
        steps.append(Step(label, inputs, edges, compute))
    fed = tuple(Edge(_name(value), _dtype(value)) for value in graph.inputs)
    outputs = tuple(map(_name, graph.outputs))
    return Program(fed, constants, in_order(steps, [*constants, *(edge.name for edge in fed)], outputs), outputs, model)


def meaning_of(node: ir.Node) -> tuple[str, Compute]:
    """What a node is called where it is told of, and what it computes.

    Raises:
        CannotEvaluate: an operator or attribute without a meaning here.
    """
    key = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    if key not in OPERATORS:
        raise CannotEvaluate(f"operator {key}")
    attributes = Attributes(node)
    compute = OPERATORS[key](attributes)
    attributes.finish()
    return attributes.label, compute


def _edge(value: ir.Value, dtype: torch.dtype) -> Edge:
    if value.dtype is not None and _dtype(value) != dtype:
        raise CannotEvaluate(f"rule of ONNX by which {value.name} is {value.dtype.name} and not {dtype}")
    return Edge(_name(value), dtype)


def _result_dtype(node: ir.Node, place: int, dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """The dtype that ONNX gives a node's output: that of its first input, but for a few."""
    if node.op_type in ("Cast", MERGE_ATTENTION):
        return _torch_dtype(ir.DataType(node.attributes["to"].as_int()), f"{node.op_type} {node.outputs[0].name}")
    if node.op_type == "Shape":
        return torch.int64
    if node.op_type == SPLIT_ATTENTION:
        return torch.float32
    if node.op_type in _BOOLEAN:
        return torch.bool
    if node.op_type == "GroupQueryAttention" and place:
        typed = node.inputs[2 + place]  # present has the past's
    else:
        typed = node.inputs[_TYPED_BY.get(node.op_type, 0)]
    assert typed is not None
    return dtypes[_name(typed)]


def _name(value: ir.Value) -> str:
    assert value.name is not None
    return value.name


def _dtype(value: ir.Value) -> torch.dtype:
    found = value.dtype if value.dtype is not None or value.const_value is None else value.const_value.dtype
    return _torch_dtype(found, f"value {value.name}")


def _torch_dtype(found: ir.DataType | None, what: str) -> torch.dtype:
    if found not in _DTYPES:
        raise CannotEvaluate(f"dtype {found} of {what}")
    return _DTYPES[found]
