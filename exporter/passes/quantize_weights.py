"""Weight matrices as a recipe rounds them: the operators that read them in that form."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.origin import derive_parts, is_weight, origin_of
from exporter.parameters import is_matrix, role_of
from exporter.passes.base import GraphPass
from exporter.recipe import Precision
from exporter.rounding import SCALES, VALUES, ZERO_POINTS, BlockInt4, BlockNBits, Rounding
from plugins.onnxruntime import CONTRIB_DOMAIN
from runtime.errors import UserError

ACCURACY_LEVEL = 4  # activations in int8: at 8 bits any other level is slower by orders of magnitude


class QuantizeWeights(GraphPass):
    """Projections of the layers, the vocabulary's head and the embedding; a head of few labels stays as it is.

    ONNX Runtime has operators of its own for each; TensorRT fuses DequantizeLinear into the product that follows.
    """

    name: ClassVar[str] = "quantize_weights"

    def __init__(self, precision: Precision) -> None:
        self.precision = precision

    def apply(self, model: ir.Model) -> int:
        """Replace every product with a matrix that is to be rounded, and the embedding's lookup."""
        count = 0
        for node in list(model.graph):
            place = {"MatMul": 1, "Gather": 0}.get(node.op_type)
            weight = None if place is None else node.inputs[place]
            if weight is None or not is_weight(weight) or not is_matrix(origin_of(weight).tensor):
                continue
            rounding = self.precision.rounding(_named(weight, node))
            if rounding is None or (node.op_type == "Gather" and not isinstance(rounding, BlockNBits)):
                continue  # TensorRT would dequantise the whole table for each lookup
            self._replace(model.graph, node, weight, rounding)
            count += 1
        return count

    def ensures(self, model: ir.Model) -> None:
        """What the recipe rounds is read in no other form."""
        for node in model.graph:
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            if weight is not None and is_weight(weight) and is_matrix(_named(weight, node)):
                name = _named(weight, node)
                if self.precision.rounding(name) is not None:
                    raise self.fail(f"{name} is still multiplied in {weight.dtype}")

    def _replace(self, graph: ir.Graph, node: ir.Node, weight: ir.Value, rounding: Rounding) -> None:
        output = node.outputs[0]
        assert output.dtype is not None
        parts = derive_parts(weight, rounding, output.dtype)
        if isinstance(rounding, BlockNBits):
            make = _matmul_nbits if node.op_type == "MatMul" else _gather_blocks
            new = [make(node, weight, rounding, parts)]
        else:
            new = _dequantized(node, rounding, parts)
        new[-1].outputs[0].shape, new[-1].outputs[0].type = output.shape, output.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], new, [output], [new[-1].outputs[0]])


def _named(weight: ir.Value, node: ir.Node) -> str:
    """The matrix's name; tied ones have one name in the trace, and each the name of what it does here."""
    return role_of(origin_of(weight).tensor, lookup=node.op_type == "Gather")


def _matmul_nbits(node: ir.Node, weight: ir.Value, rounding: BlockNBits, parts: dict[str, ir.Value]) -> ir.Node:
    assert weight.shape is not None
    width, out = (int(dim) for dim in weight.shape.numpy())  # transposed: [in, out]
    return ir.node(
        "MatMulNBits",
        [node.inputs[0], parts[VALUES], parts[SCALES], parts.get(ZERO_POINTS)],
        {
            "K": width,
            "N": out,
            "bits": rounding.bits,
            "block_size": rounding.block,
            "accuracy_level": ACCURACY_LEVEL,
        },
        domain=CONTRIB_DOMAIN,
        name=node.name,
    )


def _gather_blocks(node: ir.Node, weight: ir.Value, rounding: BlockNBits, parts: dict[str, ir.Value]) -> ir.Node:
    values = parts[VALUES]
    assert weight.shape is not None
    rows, width = (int(dim) for dim in weight.shape.numpy())
    if width % rounding.block:
        raise UserError(
            f"an embedding of {width} is not a whole number of blocks of {rounding.block}; "
            "give a --recipe with smaller blocks"
        )
    values.shape = ir.Shape([rows, width * rounding.bits // 8])  # the blocks' bytes, one after the other
    return ir.node(
        "GatherBlockQuantized",
        [values, node.inputs[1], parts[SCALES], parts.get(ZERO_POINTS)],
        {"bits": rounding.bits, "block_size": rounding.block, "gather_axis": 0, "quantize_axis": 1},
        domain=CONTRIB_DOMAIN,
        name=node.name,
    )


def _dequantized(node: ir.Node, rounding: Rounding, parts: dict[str, ir.Value]) -> list[ir.Node]:
    blocks = {"axis": 0, "block_size": rounding.block} if isinstance(rounding, BlockInt4) else {"axis": 1}
    dequantize = ir.node("DequantizeLinear", [parts[VALUES], parts[SCALES]], blocks, name=f"{node.name}.weight")
    matrix = dequantize.outputs[0]
    matrix.shape, matrix.type = parts[VALUES].shape, parts[SCALES].type
    return [dequantize, ir.node("MatMul", [node.inputs[0], matrix], name=node.name)]
