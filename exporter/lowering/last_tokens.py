"""Which positions of a row its last real tokens are, computed in the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from runtime.contract import LOGITS_TO_KEEP


class Nodes:
    """Nodes that a contract adds to a graph, and each constant of it once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._tape = ir.tape.Tape()

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """A node of one output."""
        return self._tape.op(op_type, list(inputs), attributes)

    def constant(self, name: str, value: Any) -> ir.Value:
        """An initializer; its dtype is the value's."""
        name = f"contract.{name}"
        if name not in self.graph.initializers:
            self.graph.initializers.add(ir.val(name, const_value=ir.tensor(np.asarray(value), name=name)))
        return self.graph.initializers[name]

    def take(self) -> list[ir.Node]:
        """The nodes made since the last call."""
        nodes, self._tape = list(self._tape.nodes), ir.tape.Tape()
        return nodes


def last_columns(nodes: Nodes, last: ir.Value, keep: ir.Value) -> ir.Value:
    """Columns of each row's last `keep` tokens, none below 0: int64 [batch, keep].

    Args:
        nodes: where the nodes go.
        last: int64 [batch], the column of each row's last token.
        keep: int64 [1].
    """
    zero, one = nodes.constant("zero", 0), nodes.constant("one", 1)
    count = nodes("Squeeze", keep)
    back = nodes("Sub", nodes("Range", zero, count, one), nodes("Sub", count, one))  # 1 - keep … 0
    column = nodes("Unsqueeze", last, nodes.constant("axis_1", [1]))
    return nodes("Max", nodes("Add", column, back), zero)


def rightmost(nodes: Nodes, chosen: ir.Value) -> ir.Value:
    """The rightmost column of each row where `chosen`, bool [batch, sequence], is true, or 0: int64 [batch]."""
    sequence = nodes("Squeeze", nodes("Shape", chosen, start=1, end=2))
    columns = nodes("Range", nodes.constant("zero", 0), sequence, nodes.constant("one", 1))
    marked = nodes("Mul", nodes("Cast", chosen, to=ir.DataType.INT64), columns)
    return nodes("ReduceMax", marked, nodes.constant("axis_1", [1]), keepdims=0)


def logits_to_keep() -> ir.Value:
    """The optional input int64 [1]: an input with an initializer is 1 where it is not given."""
    return ir.val(LOGITS_TO_KEEP, const_value=ir.tensor(np.array([1], np.int64), name=LOGITS_TO_KEEP))
