"""From the fused graph to a target: each fused op takes the target's form, and the graph its contract.

Fused graphs take `write_indices` [batch] and `logits_indices` [batch, kept]; target `onnxruntime` has the contract of
Hugging Face exports instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from exporter.lowering.mask_contract import MaskContract
from plugins.onnxruntime import CONTRIB_DOMAIN, GROUP_QUERY_ATTENTION, CannotLower
from plugins.ops import DOMAIN, is_partial_rope_attention
from plugins.tensorrt import ATTENTION, lower_to_standard_attention
from runtime.contract import INPUT_IDS, WRITE_INDICES
from runtime.errors import UserError


@dataclass(frozen=True)
class Target:
    """What a graph is lowered to.

    Attributes:
        attention: the operator that each layer's attention becomes.
        opsets: domains of the lowered graph and their versions.
        lower: turns a fused graph into this form, in place.
        precisions: those that graphs of this target can have.
    """

    attention: str
    opsets: dict[str, int]
    lower: Callable[[ir.Graph], None]
    precisions: tuple[str, ...]

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return self.opsets[""]


def _lower_to_standard_attention(graph: ir.Graph) -> None:
    inputs = {value.name: value for value in graph.inputs}
    lower_to_standard_attention(graph, inputs[INPUT_IDS], inputs[WRITE_INDICES])


TARGETS = {
    "onnxruntime": Target(
        GROUP_QUERY_ATTENTION,
        # The newest that every consumer of these graphs reads; no operator in them has changed its meaning since.
        {"": 21, CONTRIB_DOMAIN: 1},
        lambda graph: MaskContract(graph).adopt(),
        ("fp32",),
    ),
    "tensorrt": Target(ATTENTION, {"": 24}, _lower_to_standard_attention, ("fp32", "fp16", "bf16")),
}


def lower(model: ir.Model, name: str, layers: int) -> Target:
    """Lower a fused graph in place; a graph already lowered stays as it is.

    Raises:
        UserError: an unknown target, or a model that the target's operators cannot express.
    """
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    target = TARGETS[name]
    if any(is_partial_rope_attention(node) for node in model.graph):
        try:
            target.lower(model.graph)
        except CannotLower as error:
            raise UserError(f"target {name}: {error}; this model cannot be exported to it yet") from error
    for identifier in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[identifier]
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports.update(target.opsets)
    lowered = sum(node.op_type == target.attention for node in model.graph)
    if lowered != layers:
        raise UserError(f"target {name}: {lowered} attentions for {layers} layers; nothing was exported")
    return target
