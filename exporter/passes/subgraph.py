"""Evaluate a small part of a graph by ONNX's reference implementation, so that a pass can check what it replaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator


def evaluate(
    model: ir.Model, outputs: Sequence[ir.Value], feeds: Mapping[str, NDArray[np.generic]]
) -> list[NDArray[np.generic]]:
    """Values of the graph for given inputs; only the nodes they depend on are run, none of which may read a weight."""
    inputs = [value for value in model.graph.inputs if value.name in feeds]
    part = ir.convenience.extract(model.graph, inputs=inputs, outputs=list(outputs))
    proto = ir.to_proto(ir.Model(part, ir_version=model.ir_version))
    values = ReferenceEvaluator(proto).run(None, {name: feeds[name] for name in (v.name for v in inputs) if name})
    return [np.asarray(value) for value in values]
