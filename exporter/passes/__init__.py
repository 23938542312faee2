"""The visible, ordered list of graph passes, from the trace to the form that every target is lowered from."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.passes.base import GraphPass, PassReport
from exporter.passes.clean_up import CleanUp
from exporter.passes.fold_layernorm1p import FoldLayerNorm1P
from exporter.passes.fold_weight_transposes import FoldWeightTransposes
from exporter.passes.fuse_partial_rope_attention import FusePartialRopeAttention
from exporter.passes.requested_logits import RequestedLogits
from exporter.passes.set_precision import SetPrecision
from exporter.passes.square_relu import SquareRelu
from exporter.spec import NemotronSpec


def pipeline(
    spec: NemotronSpec, cos: NDArray[np.float32], sin: NDArray[np.float32], precision: str = "fp32"
) -> list[GraphPass]:
    """The passes in order.

    Args:
        spec: what the model has.
        cos, sin: the rotary tables, float32 [max_length, rotary_dim/2].
        precision: one of `exporter.passes.set_precision.DTYPES`.
    """
    return [
        FoldLayerNorm1P(spec.layers),
        FusePartialRopeAttention(spec, cos, sin),
        RequestedLogits(),
        SquareRelu(spec.layers if spec.activation == "relu2" else 0),
        FoldWeightTransposes(),
        *([SetPrecision(precision)] if precision != "fp32" else []),
        CleanUp(),
    ]


def run(passes: list[GraphPass], model: ir.Model) -> list[PassReport]:
    """Run passes in order, in place. Each stops the export where its postcondition does not hold."""
    return [graph_pass(model) for graph_pass in passes]
