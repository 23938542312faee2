"""Nodes on their way into a graph, and the constants they read."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


class Nodes:
    """Makes nodes, and each constant of a graph once."""

    def __init__(self, graph: ir.Graph, purpose: str) -> None:
        """Begin with no node.

        Args:
            graph: where the constants go.
            purpose: what the constants' names begin with; makers of one purpose share them.
        """
        self._graph, self._purpose = graph, purpose
        self._tape = ir.tape.Tape()

    def __call__(self, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node of one output."""
        return self._tape.op(op_type, list(inputs), attributes)

    def many(
        self, op_type: str, outputs: int, *inputs: ir.Value | None, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """A node of several outputs."""
        return list(self._tape.op_multi_out(op_type, list(inputs), attributes, num_outputs=outputs, domain=domain))

    def constant(self, name: str, value: Any) -> ir.Value:
        """An initializer: int64 for integers, else of the value's own dtype."""
        name = f"{self._purpose}.{name}"
        if name not in self._graph.initializers:
            array = np.asarray(value)
            tensor = ir.tensor(array.astype(np.int64) if array.dtype.kind == "i" else array, name=name)
            self._graph.initializers.add(ir.val(name, const_value=tensor))
        return self._graph.initializers[name]

    def take(self) -> list[ir.Node]:
        """The nodes made since the last call."""
        nodes, self._tape = list(self._tape.nodes), ir.tape.Tape()
        return nodes
