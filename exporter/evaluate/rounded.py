"""The rounded matrices of a graph as numbers, by the parameter that each stands for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import onnx_ir as ir
import torch

from exporter.evaluate.onnx_graph import read_tensor
from exporter.evaluate.onnx_quantized import dequantized, from_blocks
from exporter.parameters import role_of
from exporter.rounding import VALUES
from exporter.scaling import Scaling
from runtime.bundle import Bundle
from runtime.manifest import MODEL

Tensor = torch.Tensor


def weights_of(bundle: Bundle, scaling: Scaling) -> dict[str, Callable[[], Tensor]]:
    """The matrices that a bundle rounds, as `rounded_weights` has them; the others are the checkpoint's."""
    return rounded_weights(ir.load(bundle.file(MODEL)).graph, scaling) if bundle.manifest.quantization else {}


def rounded_weights(graph: ir.Graph, scaling: Scaling) -> dict[str, Callable[[], Tensor]]:
    """Readers of every rounded matrix, float32 [out_features, in_features], by the parameter it stands for.

    Its factors are taken out of it: it reads and makes the channels of the checkpoint.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    for node in graph:
        if node.op_type in _MATRICES:
            values = node.inputs[0 if node.op_type != "MatMulNBits" else 1]
            assert values is not None
            assert values.name is not None
            name = values.name.removesuffix(f".{VALUES}").removesuffix(".transposed")
            role = role_of(name, lookup=node.op_type == "GatherBlockQuantized")
            found[role] = partial(_unscaled, role, node, scaling)
    return found


def _unscaled(role: str, node: ir.Node, scaling: Scaling) -> Tensor:
    return scaling.undo(role, _MATRICES[node.op_type](node))


def _read(value: ir.Value | None) -> Tensor:
    assert value is not None
    assert value.const_value is not None
    return read_tensor(value.const_value)


def _of_product(node: ir.Node) -> Tensor:
    _, values, scales, *points = node.inputs
    matrix = _of_blocks(node, values, scales, points)
    return matrix[:, : node.attributes.get_int("K")]


def _of_lookup(node: ir.Node) -> Tensor:
    values, _, scales, *points = node.inputs
    return _of_blocks(node, values, scales, points)


def _of_blocks(
    node: ir.Node, values: ir.Value | None, scales: ir.Value | None, points: list[ir.Value | None]
) -> Tensor:
    given = _read(points[0]) if points and points[0] is not None else None
    bits, block = (node.attributes.get_int(name) or 0 for name in ("bits", "block_size"))
    return from_blocks(_read(values), _read(scales), given, bits, block)


def _of_dequantized(node: ir.Node) -> Tensor:
    axis, block = (node.attributes.get_int(name) or 0 for name in ("axis", "block_size"))
    return dequantized(_read(node.inputs[0]), _read(node.inputs[1]), axis, block).T


_MATRICES: dict[str, Callable[[ir.Node], Tensor]] = {
    "MatMulNBits": _of_product,
    "GatherBlockQuantized": _of_lookup,
    "DequantizeLinear": _of_dequantized,
}
