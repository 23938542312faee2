"""Embeddings go in where token ids did: for callers who make them, or change them, themselves."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.origin import is_weight
from exporter.passes.base import GraphPass
from exporter.spec import NemotronSpec
from runtime.contract import INPUT_IDS, INPUTS_EMBEDS


class EmbeddingsAsInput(GraphPass):
    """`inputs_embeds` [batch, sequence, hidden] in place of `input_ids` and the embedding's Gather."""

    name: ClassVar[str] = "embeddings_as_input"

    def __init__(self, spec: NemotronSpec) -> None:
        self.spec = spec

    def apply(self, model: ir.Model) -> int:
        """Replace the input, unless it is there."""
        graph = model.graph
        if any(value.name == INPUTS_EMBEDS for value in graph.inputs):
            return 0
        ids = next(value for value in graph.inputs if value.name == INPUT_IDS)
        lookups = [use.node for use in ids.uses() if use.node.op_type == "Gather" and is_weight(use.node.inputs[0])]
        others = [use.node.op_type for use in ids.uses() if use.node not in lookups and use.node.op_type != "Shape"]
        if len(lookups) != 1 or others:
            raise self.fail(f"{INPUT_IDS} is read by {len(lookups)} embeddings and by {', '.join(others) or 'nothing'}")
        embeds = ir.val(INPUTS_EMBEDS, dtype=ir.DataType.FLOAT, shape=["batch", "sequence", self.spec.hidden])
        graph.inputs[list(graph.inputs).index(ids)] = embeds
        ir.convenience.replace_all_uses_with(lookups[0].outputs[0], embeds)
        graph.remove(lookups[0], safe=True)
        for use in list(ids.uses()):  # a Shape, whose first two dimensions are the same
            _cut(use.node)
            use.node.replace_input_with(use.idx, embeds)
        return 1


def _cut(shape: ir.Node) -> None:
    """A Shape of everything becomes one of batch and sequence."""
    if "end" not in shape.attributes:
        shape.attributes.add(ir.AttrInt64("end", 2))
