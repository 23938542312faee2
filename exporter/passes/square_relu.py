"""relu(x)² is traced as a power; a product is the same number and faster everywhere."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.passes.base import LayerPass, constant_of, layers_of


class SquareRelu(LayerPass):
    """`Pow(Relu(x), 2)` becomes `Mul(r, r)`."""

    name: ClassVar[str] = "square_relu"

    def __init__(self, activation: str) -> None:
        self.activation = activation

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

    def made(self, model: ir.Model) -> int:
        """Squared Relus."""
        return sum(
            node.op_type == "Mul" and node.inputs[0] is node.inputs[1] and _from_relu(node.inputs[0])
            for node in model.graph
        )

    def ensures(self, model: ir.Model) -> None:
        """One squared Relu per layer of a relu² model, none in another."""
        found, expected = self.made(model), layers_of(model.graph) if self.activation == "relu2" else 0
        if found != expected:
            raise self.fail(f"found {found} squared Relu where {expected} are expected")


def _is_squared_relu(node: ir.Node) -> bool:
    if node.op_type != "Pow" or not _from_relu(node.inputs[0]):
        return False
    return constant_of(node.inputs[1]) == 2.0


def _from_relu(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "Relu"
