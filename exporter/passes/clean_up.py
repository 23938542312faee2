"""Fold constants, merge equal nodes, drop what nothing uses: what is left is what runs."""

from __future__ import annotations

import logging
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from exporter.passes.base import GraphPass


class CleanUp(GraphPass):
    """onnxscript's optimizer, without touching weights, and removal of unused initializers and opsets."""

    name: ClassVar[str] = "clean_up"

    def apply(self, model: ir.Model) -> int:
        """Optimize; the count is of nodes removed."""
        before = len(model.graph)
        deduplication = logging.getLogger("onnx_ir.passes.common.initializer_deduplication")
        level = deduplication.level
        deduplication.setLevel(logging.ERROR)  # it warns of every weight, since none has a value yet
        try:
            optimizer.optimize_ir(model, inline=False)
        finally:
            deduplication.setLevel(level)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        common.ClearMetadataAndDocStringPass()(model)  # stack traces of the tracer, with paths of this machine
        return before - len(model.graph)
