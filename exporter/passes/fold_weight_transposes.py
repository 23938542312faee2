"""A Linear is traced as a MatMul with its weight transposed: transpose once, while the weight is written."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.origin import derive, is_weight, origin_of
from exporter.passes.base import LayerPass


class FoldWeightTransposes(LayerPass):
    """`Transpose(weight)` becomes an initializer of the transposed shape."""

    name: ClassVar[str] = "fold_weight_transposes"

    def apply(self, model: ir.Model) -> int:
        """Fold every two-dimensional transpose of a weight."""
        folded = 0
        for node in model.graph:
            weight = node.inputs[0] if node.op_type == "Transpose" else None
            if weight is None or not is_weight(weight):
                continue
            derived = derive(weight, "transposed", transposed=True)
            ir.convenience.replace_all_uses_with(node.outputs[0], derived)
            model.graph.remove(node, safe=True)
            folded += 1
        return folded

    def made(self, model: ir.Model) -> int:
        """Transposed weights that are read."""
        weights = (value for value in model.graph.initializers.values() if is_weight(value) and value.uses())
        return sum(origin_of(value).transposed for value in weights)

    def ensures(self, model: ir.Model) -> None:
        """No weight is transposed at run time."""
        left = [node.name for node in model.graph if node.op_type == "Transpose" and is_weight(node.inputs[0])]
        if left:
            raise self.fail(f"{', '.join(map(str, left))} still transpose weights")
