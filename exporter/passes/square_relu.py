"""relu(x)² is traced as a power; a product is the same number and faster everywhere."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.passes.base import GraphPass, constant_of


class SquareRelu(GraphPass):
    """`Pow(Relu(x), 2)` becomes `Mul(r, r)`."""

    name: ClassVar[str] = "square_relu"

    def __init__(self, expected: int) -> None:
        self.expected = expected  # the number of layers where the activation is relu², else 0

    def apply(self, model: ir.Model) -> int:
        """Replace every square of a Relu."""
        squares = [node for node in model.graph if _is_squared_relu(node)]
        for power in squares:
            relu = power.inputs[0]
            product = ir.node("Mul", [relu, relu])
            product.outputs[0].shape, product.outputs[0].type = power.outputs[0].shape, power.outputs[0].type
            ir.convenience.replace_nodes_and_values(
                model.graph, power, [power], [product], power.outputs, product.outputs
            )
        return len(squares)

    def ensures(self, model: ir.Model) -> None:
        """One squared Relu per layer of a relu² model, none in another."""
        found = sum(
            node.op_type == "Mul" and node.inputs[0] is node.inputs[1] and _from_relu(node.inputs[0])
            for node in model.graph
        )
        if found != self.expected:
            raise self.fail(f"found {found} squared Relu where {self.expected} are expected")


def _is_squared_relu(node: ir.Node) -> bool:
    if node.op_type != "Pow" or not _from_relu(node.inputs[0]):
        return False
    return constant_of(node.inputs[1]) == 2.0


def _from_relu(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "Relu"
