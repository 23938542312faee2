"""Compute logits for requested positions only: with 256 000 tokens, those of a whole prompt are gigabytes."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.passes.base import GraphPass
from exporter.passes.last_tokens import CONTRACT, rightmost
from plugins.nodes import Nodes
from runtime.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_INDICES

PRODUCTS = ("MatMul", "FusedMatMul")  # the latter where matrices are read as they are stored


class _GatheredLogits(GraphPass):
    """Gathers columns [batch, kept] of the hidden state ahead of the final norm and the head, which work row by row."""

    def _gather(self, graph: ir.Graph, indices: ir.Value, nodes: Nodes) -> ir.Value:
        """Put the gather in; return the logits, now [batch, kept, vocab or labels]."""
        logits = next(value for value in graph.outputs if value.name == LOGITS)
        head, norm = self._head_and_norm(logits)
        # The norm of every position is wanted where it is handed out.
        reader, place = (head, norm.outputs[0]) if norm.outputs[0].is_graph_output() else (norm, norm.inputs[0])
        assert place is not None
        assert place.shape is not None
        assert logits.shape is not None
        column = nodes("Unsqueeze", indices, nodes.constant("last_axis", [-1]))
        kept = nodes("GatherND", place, column, batch_dims=1)
        graph.insert_before(reader, nodes.take())
        reader.replace_input_with(0, kept)
        kept.type, kept.shape = place.type, ir.Shape(["batch", "kept", place.shape[-1]])
        if reader is norm:
            norm.outputs[0].shape = kept.shape.copy()
        logits.shape = ir.Shape(["batch", "kept", logits.shape[-1]])
        return logits

    def _head_and_norm(self, logits: ir.Value) -> tuple[ir.Node, ir.Node]:
        head = logits.producer()
        normed = head.inputs[0] if head is not None and head.op_type in PRODUCTS else None
        norm = normed.producer() if normed is not None else None
        if head is None or norm is None or norm.op_type != "LayerNormalization":
            raise self.fail("logits are no product with the final LayerNormalization")
        return head, norm


class RequestedLogits(_GatheredLogits):
    """Logits of each row's `logits_indices` [batch, kept]."""

    name: ClassVar[str] = "requested_logits"

    def apply(self, model: ir.Model) -> int:
        """Add the input and the gather, unless they are there."""
        graph = model.graph
        if any(value.name == LOGITS_INDICES for value in graph.inputs):
            return 0
        indices = ir.val(LOGITS_INDICES, dtype=ir.DataType.INT64, shape=["batch", "kept"])
        graph.inputs.insert(2, indices)
        self._gather(graph, indices, Nodes(graph, CONTRACT))
        return 1


class PooledLogits(_GatheredLogits):
    """Logits [batch, labels] of each row's last token that is not padding.

    Padding is `pad_token`, as in transformers, on either side; without one, or where there are no ids to look at, it is
    what the attention mask says.
    """

    name: ClassVar[str] = "pooled_logits"

    def __init__(self, pad_token: int | None) -> None:
        self.pad_token = pad_token

    def apply(self, model: ir.Model) -> int:
        """Choose the token ahead of the final norm, unless it is chosen already."""
        graph = model.graph
        logits = next(value for value in graph.outputs if value.name == LOGITS)
        producer = logits.producer()
        if producer is not None and producer.op_type == "Squeeze":
            return 0
        nodes = Nodes(graph, CONTRACT)
        inputs = {value.name: value for value in graph.inputs}
        by_mask = self.pad_token is None
        source = inputs[ATTENTION_MASK if by_mask else INPUT_IDS]
        padding = nodes.constant("zero", 0) if by_mask else nodes.constant("pad_token", self.pad_token)
        last = rightmost(nodes, nodes("Not", nodes("Equal", source, padding)))
        column = nodes("Unsqueeze", last, nodes.constant("axis_1", [1]))
        logits = self._gather(graph, column, nodes)
        assert logits.shape is not None
        pooled = nodes("Squeeze", logits, nodes.constant("axis_1", [1]))
        pooled.shape, pooled.type = ir.Shape(["batch", logits.shape[-1]]), logits.type
        graph.extend(nodes.take())
        logits.name, pooled.name = f"{LOGITS}.unpooled", LOGITS
        graph.outputs[list(graph.outputs).index(logits)] = pooled
        return 1
