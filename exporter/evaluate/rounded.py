"""The rounded matrices of a graph as numbers, by the parameter that each stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import onnx_ir as ir
import torch

from exporter.evaluate.onnx_quantized import dequantized, from_blocks
from exporter.evaluate.tensors import WHOLE, read_tensor
from exporter.parameters import role_of
from exporter.rounding import VALUES
from exporter.scaling import Scaling
from runtime.bundle import Bundle
from runtime.manifest import MODEL

Tensor = torch.Tensor


class Reader(Protocol):
    """Reads a matrix, or some of its rows: float32 [out_features, in_features]."""

    def __call__(self, rows: slice = WHOLE) -> Tensor:
        """Those of the matrix."""
        ...


def weights_of(bundle: Bundle, scaling: Scaling) -> dict[str, Reader]:
    """The matrices that a bundle rounds, as `rounded_weights` has them; the others are the checkpoint's."""
    return rounded_weights(ir.load(bundle.file(MODEL)).graph, scaling) if bundle.manifest.quantization else {}


def rounded_weights(graph: ir.Graph, scaling: Scaling) -> dict[str, Reader]:
    """Readers of every rounded matrix by the parameter it stands for.

    Its factors are taken out of it: it reads and makes the channels of the checkpoint.
    """
    found: dict[str, Reader] = {}
    for node in graph:
        if node.op_type in _MATRICES:
            values = node.inputs[0 if node.op_type != "MatMulNBits" else 1]
            assert values is not None
            assert values.name is not None
            name = values.name.removesuffix(f".{VALUES}").removesuffix(".transposed")
            role = role_of(name, lookup=node.op_type == "GatherBlockQuantized")
            found[role] = partial(_unscaled, role, node, scaling)
    return found


def _unscaled(role: str, node: ir.Node, scaling: Scaling, rows: slice = WHOLE) -> Tensor:
    return scaling.undo(role, _MATRICES[node.op_type](node, rows), rows)


def _read(value: ir.Value | None, part: slice, axis: int = 0) -> Tensor:
    assert value is not None
    assert value.const_value is not None
    return read_tensor(value.const_value, part, axis)


def _of_product(node: ir.Node, rows: slice) -> Tensor:
    _, values, scales, *points = node.inputs
    matrix = _of_blocks(node, values, scales, points, rows)
    return matrix[:, : node.attributes.get_int("K")]


def _of_lookup(node: ir.Node, rows: slice) -> Tensor:
    values, _, scales, *points = node.inputs
    return _of_blocks(node, values, scales, points, rows)


def _of_blocks(
    node: ir.Node, values: ir.Value | None, scales: ir.Value | None, points: list[ir.Value | None], rows: slice
) -> Tensor:
    given = _read(points[0], rows) if points and points[0] is not None else None
    bits, block = (node.attributes.get_int(name) or 0 for name in ("bits", "block_size"))
    return from_blocks(_read(values, rows), _read(scales, rows), given, bits, block)


def _of_dequantized(node: ir.Node, rows: slice) -> Tensor:
    axis, block = (node.attributes.get_int(name) or 0 for name in ("axis", "block_size"))
    scales = _read(node.inputs[1], rows, -1)  # [blocks, out], or [out]
    return dequantized(_read(node.inputs[0], rows, -1), scales, axis, block).T


_MATRICES: Mapping[str, Callable[[ir.Node, slice], Tensor]] = {
    "MatMulNBits": _of_product,
    "GatherBlockQuantized": _of_lookup,
    "DequantizeLinear": _of_dequantized,
}
