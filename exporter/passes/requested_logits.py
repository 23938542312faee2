"""Compute logits for requested positions only: with 256 000 tokens, those of a whole prompt are gigabytes."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.passes.base import GraphPass
from runtime.contract import LOGITS, LOGITS_INDICES


class RequestedLogits(GraphPass):
    """Gather each row's `logits_indices` [batch, kept] ahead of the final norm and the head, which work row by row."""

    name: ClassVar[str] = "requested_logits"

    def apply(self, model: ir.Model) -> int:
        """Add the input and the gather, unless they are there."""
        graph = model.graph
        if any(value.name == LOGITS_INDICES for value in graph.inputs):
            return 0
        logits = next(value for value in graph.outputs if value.name == LOGITS)
        norm = self._final_norm(logits)
        hidden = norm.inputs[0]
        assert hidden is not None

        indices = ir.val(LOGITS_INDICES, dtype=ir.DataType.INT64, shape=["batch", "kept"])
        graph.inputs.insert(2, indices)
        tape = ir.tape.Tape()
        axis = tape.initializer(ir.tensor([-1], name="logits_indices.axis"))
        column = tape.op("Unsqueeze", [indices, axis])
        kept = tape.op("GatherND", [hidden, column], {"batch_dims": 1})
        graph.insert_before(norm, tape.nodes)
        graph.initializers.add(axis)
        norm.replace_input_with(0, kept)

        assert hidden.shape is not None
        assert logits.shape is not None
        kept.shape = ir.Shape(["batch", "kept", hidden.shape[-1]])
        norm.outputs[0].shape = kept.shape.copy()
        logits.shape = ir.Shape(["batch", "kept", logits.shape[-1]])
        return 1

    def _final_norm(self, logits: ir.Value) -> ir.Node:
        head = logits.producer()
        normed = head.inputs[0] if head is not None and head.op_type == "MatMul" else None
        norm = normed.producer() if normed is not None else None
        if norm is None or norm.op_type != "LayerNormalization":
            raise self.fail("logits are not a MatMul of the final LayerNormalization")
        return norm
