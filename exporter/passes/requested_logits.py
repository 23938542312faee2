"""Compute logits for requested positions only: with 256 000 tokens, those of a whole prompt are gigabytes."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.passes.base import GraphPass
from exporter.passes.last_tokens import CONTRACT, rightmost
from plugins.nodes import Nodes
from plugins.ops import is_fused
from runtime.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_INDICES

PRODUCTS = ("MatMul", "FusedMatMul")  # the latter where matrices are read as they are stored


class _GatheredLogits(GraphPass):
    """Gathers columns [batch, kept] of the hidden state where all that follows works row by row."""

    def _gather(self, graph: ir.Graph, indices: ir.Value, nodes: Nodes) -> ir.Value:
        """Put the gathers in; return the logits, now [batch, kept, vocab or labels].

        Behind the last attention nothing looks at other columns: its output projection, MLP and norm, and the head, are
        computed for the kept ones alone, unless the norm of every column is handed out.
        """
        logits = next(value for value in graph.outputs if value.name == LOGITS)
        head, norm = self._head_and_norm(logits)
        rowwise = [head] if norm.outputs[0].is_graph_output() else self._behind_attention(graph, norm, head)
        column = nodes("Unsqueeze", indices, nodes.constant("last_axis", [-1]))
        made = {output for node in rowwise for output in node.outputs}
        gathered: dict[ir.Value, ir.Value] = {}
        for node in rowwise:
            for place, value in enumerate(node.inputs):
                if value is None or value in made or not _is_of_columns(value):
                    continue
                if value not in gathered:
                    kept = gathered[value] = nodes("GatherND", value, column, batch_dims=1)
                    kept.type, kept.shape = value.type, _kept(value)
                node.replace_input_with(place, gathered[value])
        graph.insert_before(rowwise[0], nodes.take())
        for value in made:
            value.shape = _kept(value)
        return logits

    def _behind_attention(self, graph: ir.Graph, norm: ir.Node, head: ir.Node) -> list[ir.Node]:
        """The nodes from the last attention's context to the logits, in order."""
        attention = next((node for node in reversed(graph) if is_fused(node)), None)
        if attention is None:
            raise self.fail("no fused attention is ahead of the final LayerNormalization")
        behind, depending = list[ir.Node](), {attention.outputs[0]}
        for node in graph:
            if depending & set(node.inputs):
                behind.append(node)
                depending.update(node.outputs)
        if behind[-2:] != [norm, head]:
            raise self.fail("the last layer's output is read by more than the final LayerNormalization and the head")
        return behind

    def _head_and_norm(self, logits: ir.Value) -> tuple[ir.Node, ir.Node]:
        head = logits.producer()
        normed = head.inputs[0] if head is not None and head.op_type in PRODUCTS else None
        norm = normed.producer() if normed is not None else None
        if head is None or norm is None or norm.op_type != "LayerNormalization":
            raise self.fail("logits are no product with the final LayerNormalization")
        return head, norm


def _is_of_columns(value: ir.Value) -> bool:
    """Whether a value has something for each token: [batch, sequence, …]."""
    return value.shape is not None and len(value.shape) == 3 and not value.is_initializer()


def _kept(value: ir.Value) -> ir.Shape:
    assert value.shape is not None
    return ir.Shape(["batch", "kept", value.shape[-1]])


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
