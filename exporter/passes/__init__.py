"""The visible, ordered list of graph passes, from the trace to the form that every target is lowered from.

Those that know the traced pattern see one layer; then the layer is repeated, and the others see the whole model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.passes.base import GraphPass, LayerPass, PassReport
from exporter.passes.clean_up import CleanUp
from exporter.passes.embeddings_as_input import EmbeddingsAsInput
from exporter.passes.fold_layernorm1p import FoldLayerNorm1P
from exporter.passes.fold_weight_transposes import FoldWeightTransposes
from exporter.passes.fuse_partial_rope_attention import FusePartialRopeAttention
from exporter.passes.hand_out_layers import HandOutAttentions, HandOutHiddenStates
from exporter.passes.multiply_as_stored import MultiplyAsStored
from exporter.passes.quantize_weights import QuantizeWeights
from exporter.passes.requested_logits import PooledLogits, RequestedLogits
from exporter.passes.set_precision import SetPrecision
from exporter.passes.square_relu import SquareRelu
from exporter.passes.stack_layers import StackLayers
from exporter.recipe import Precision
from exporter.spec import NemotronSpec
from exporter.tasks import GENERATION, SEQUENCES, GraphForm


@dataclass(frozen=True)
class Wanted:
    """What the passes make of a trace: a task's graph in a form and a precision, for a target.

    Attributes:
        as_stored: matrices are read as checkpoints store them, [out_features, in_features].
    """

    task: str = GENERATION
    form: GraphForm = field(default_factory=GraphForm)
    precision: Precision = field(default_factory=Precision)
    target: str = "onnxruntime"
    as_stored: bool = False


def pipeline(
    spec: NemotronSpec, cos: NDArray[np.float32], sin: NDArray[np.float32], wanted: Wanted | None = None
) -> list[GraphPass]:
    """The passes in order.

    Args:
        spec: what the model has.
        cos, sin: the rotary tables, float32 [max_length, rotary_dim/2].
        wanted: what the graph shall be (default: text generation with a cache, in fp32).
    """
    wanted = wanted or Wanted()
    form, precision = wanted.form, wanted.precision
    pad_token = None if form.embeds else spec.pad_token
    return [
        FoldLayerNorm1P(),
        FusePartialRopeAttention(spec, cos, sin, position_ids=form.position_ids),
        SquareRelu(spec.activation),
        *_products(wanted),
        StackLayers(spec),
        *([EmbeddingsAsInput(spec)] if form.embeds else []),
        *([HandOutHiddenStates(spec)] if form.hidden_states else []),
        *([HandOutAttentions(spec)] if form.attentions else []),
        *([RequestedLogits()] if wanted.task == GENERATION else []),
        *([PooledLogits(pad_token)] if wanted.task == SEQUENCES else []),
        *([SetPrecision(precision.activations)] if precision.activations != "fp32" else []),
        *([QuantizeWeights(precision)] if precision.quantized else []),
        CleanUp(),
    ]


def _products(wanted: Wanted) -> list[LayerPass]:
    """How matrices are multiplied: TensorRT reads them as they are stored by the trace's own Transpose."""
    if not wanted.as_stored:
        return [FoldWeightTransposes()]
    return [MultiplyAsStored()] if wanted.target == "onnxruntime" else []


def run(passes: list[GraphPass], model: ir.Model) -> list[PassReport]:
    """Run passes in order, in place. Each stops the export where its postcondition does not hold.

    What was made of one layer is checked again where all are there, and counts in each of them.
    """
    ahead = [graph_pass for graph_pass in passes if isinstance(graph_pass, LayerPass)]
    had = [graph_pass.made(model) for graph_pass in ahead]
    reports = []
    for graph_pass in passes:
        reports.append(graph_pass(model))
        if isinstance(graph_pass, StackLayers):
            for of_layer in ahead:
                of_layer.ensures(model)
            made = (of_layer.made(model) - before for of_layer, before in zip(ahead, had, strict=True))
            reports[: len(ahead)] = [PassReport(p.name, count) for p, count in zip(ahead, made, strict=True)]
    return reports
