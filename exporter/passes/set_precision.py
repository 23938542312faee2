"""16 bit in the graph: weights, activations and cache in fp16 or bf16, LayerNorm and what is handed out in fp32."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.passes.base import GraphPass

DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


class SetPrecision(GraphPass):
    """Every float of a fused fp32 graph takes the precision's dtype, except within LayerNorm.

    A LayerNorm keeps its weight and bias in fp32 and computes in fp32, between two casts: its variance and the +1 of
    LayerNorm1P do not survive 16 bit. Every output but the cache is rounded to the precision and handed out as fp32.
    """

    name: ClassVar[str] = "set_precision"

    def __init__(self, precision: str) -> None:
        self.dtype = DTYPES[precision]

    def apply(self, model: ir.Model) -> int:
        """Change the types and insert the casts; the count is of norms kept in fp32."""
        graph = model.graph
        if all(_is_cast(graph.outputs[place]) for place in self._handed_out(graph)):
            return 0
        norms = [node for node in graph if node.op_type == "LayerNormalization"]
        parameters = {value for node in norms for value in node.inputs[1:]}
        values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
        for value in values:
            if value.dtype == ir.DataType.FLOAT and value not in parameters:
                self._retype(value)
        for norm in norms:
            self._keep_in_fp32(graph, norm)
        for place in self._handed_out(graph):
            self._hand_out_fp32(graph, place)
        return len(norms)

    def _retype(self, value: ir.Value) -> None:
        value.type = ir.TensorType(self.dtype)  # a type of its own: copies of a graph share them
        if value.const_value is not None:
            array = value.const_value.numpy().astype(self.dtype.numpy())
            value.const_value = ir.Tensor(array, dtype=self.dtype, name=value.name)

    def _keep_in_fp32(self, graph: ir.Graph, norm: ir.Node) -> None:
        hidden, normed = norm.inputs[0], norm.outputs[0]
        assert hidden is not None
        before = _cast(hidden, ir.DataType.FLOAT)
        graph.insert_before(norm, before)
        norm.replace_input_with(0, before.outputs[0])
        after = _cast(normed, self.dtype)
        name, handed_out = normed.name, normed.is_graph_output()
        ir.convenience.replace_all_uses_with(normed, after.outputs[0], replace_graph_outputs=True)
        after.replace_input_with(0, normed)
        if handed_out:  # rounded, as everything that is
            normed.name, after.outputs[0].name = f"{name}.exact", name
        normed.dtype = ir.DataType.FLOAT
        graph.insert_after(norm, after)

    @staticmethod
    def _handed_out(graph: ir.Graph) -> list[int]:
        """The places of the outputs that are not the cache's."""
        return [place for place, value in enumerate(graph.outputs) if not str(value.name).startswith("present.")]

    @staticmethod
    def _hand_out_fp32(graph: ir.Graph, place: int) -> None:
        value = graph.outputs[place]
        name = value.name
        cast = _cast(value, ir.DataType.FLOAT)
        graph.append(cast)
        value.name, cast.outputs[0].name = f"{name}.rounded", name
        graph.outputs[place] = cast.outputs[0]


def _is_cast(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Cast"


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype})
    node.outputs[0].shape = value.shape.copy() if value.shape is not None else None
    node.outputs[0].dtype = dtype
    return node
