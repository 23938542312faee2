"""A product that reads its matrix as checkpoints store it, so that the graph can refer to their files."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.origin import is_weight
from exporter.passes.base import LayerPass
from plugins.onnxruntime import CONTRIB_DOMAIN


class MultiplyAsStored(LayerPass):
    """`MatMul(x, Transpose(weight))` becomes `com.microsoft::FusedMatMul(x, weight)` with `transB`.

    ONNX Runtime would compute a Transpose of a weight when it loads the graph, and keep a second copy in memory.
    """

    name: ClassVar[str] = "multiply_as_stored"

    def apply(self, model: ir.Model) -> int:
        """Replace every product with a transposed weight."""
        products = [node for node in model.graph if node.op_type == "MatMul" and _transpose(node) is not None]
        for product in products:
            transpose = _transpose(product)
            assert transpose is not None
            fused = ir.node(
                "FusedMatMul",
                [product.inputs[0], transpose.inputs[0]],
                {"transB": 1},
                domain=CONTRIB_DOMAIN,
                name=product.name,
            )
            output = product.outputs[0]
            fused.outputs[0].shape, fused.outputs[0].type = output.shape, output.type
            ir.convenience.replace_nodes_and_values(model.graph, product, [product], [fused], [output], fused.outputs)
            if not transpose.outputs[0].uses():
                model.graph.remove(transpose, safe=True)
        if products:
            model.opset_imports[CONTRIB_DOMAIN] = 1
        return len(products)

    def made(self, model: ir.Model) -> int:
        """Products with matrices as they are stored."""
        return sum(node.op_type == "FusedMatMul" for node in model.graph)

    def ensures(self, model: ir.Model) -> None:
        """No weight is transposed."""
        left = [node.name for node in model.graph if node.op_type == "Transpose" and is_weight(node.inputs[0])]
        if left:
            raise self.fail(f"{', '.join(map(str, left))} still transpose weights")


def _transpose(product: ir.Node) -> ir.Node | None:
    """What transposes the weight of a product; None where nothing does."""
    matrix = product.inputs[1]
    producer = None if matrix is None else matrix.producer()
    return producer if producer and producer.op_type == "Transpose" and is_weight(producer.inputs[0]) else None
