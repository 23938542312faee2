"""Which positions of a row its last real tokens are, computed in the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from plugins.nodes import Nodes
from runtime.contract import LOGITS_TO_KEEP

CONTRACT = "contract"  # what the nodes here are for, in the names of their constants


def last_columns(nodes: Nodes, ends: ir.Value, shift: ir.Value, keep: ir.Value) -> ir.Value:
    """Columns of each row's last `keep` tokens, none below 0: int64 [batch, keep].

    Args:
        nodes: where the nodes go.
        ends: int64 [batch]; with `shift`, the column behind each row's last token.
        shift: int64 [1], to be added to `ends`.
        keep: int64 [1].
    """
    column = nodes("Unsqueeze", ends, nodes.constant("axis_1", [1]))
    return nodes("Max", nodes("Add", column, range_before(nodes, shift, keep)), nodes.constant("zero", 0))


def range_before(nodes: Nodes, limit: ir.Value, count: ir.Value) -> ir.Value:
    """The `count` numbers that end below `limit`, each int64 [1]: int64 [count]."""
    start = nodes("Squeeze", nodes("Sub", limit, count))
    return nodes("Range", start, nodes("Squeeze", limit), nodes.constant("one", 1))


def rightmost(nodes: Nodes, chosen: ir.Value) -> ir.Value:
    """The rightmost column of each row where `chosen`, bool [batch, sequence], is true, or 0: int64 [batch]."""
    sequence = nodes("Squeeze", nodes("Shape", chosen, start=1, end=2))
    columns = nodes("Range", nodes.constant("zero", 0), sequence, nodes.constant("one", 1))
    marked = nodes("Mul", nodes("Cast", chosen, to=ir.DataType.INT64), columns)
    return nodes("ReduceMax", marked, nodes.constant("axis_1", [1]), keepdims=0)


def logits_to_keep() -> ir.Value:
    """The optional input int64 [1]: an input with an initializer is 1 where it is not given."""
    return ir.val(LOGITS_TO_KEEP, const_value=ir.tensor(np.array([1], np.int64), name=LOGITS_TO_KEEP))
