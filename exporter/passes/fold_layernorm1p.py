"""LayerNorm1P stores its weight minus one: let the +1 happen while the weight is written, not on every step."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.origin import derive, is_weight, origin_of
from exporter.passes.base import LayerPass, constant_of, layers_of


class FoldLayerNorm1P(LayerPass):
    """`LayerNormalization(x, Add(weight, 1), bias)` becomes `LayerNormalization(x, weight', bias)`, weight' in fp32."""

    name: ClassVar[str] = "fold_layernorm1p"

    def apply(self, model: ir.Model) -> int:
        """Fold every norm whose scale is still an Add."""
        folded = 0
        for node in model.graph:
            if node.op_type != "LayerNormalization":
                continue
            scale = node.inputs[1]
            add = scale.producer() if scale is not None else None
            if add is None or add.op_type != "Add":
                continue
            weight, one = add.inputs
            if weight is None or not is_weight(weight) or constant_of(one) != 1.0:
                raise self.fail(f"{node.name} adds something other than one to its weight")
            node.replace_input_with(1, derive(weight, "plus_one", plus_one=True))
            folded += 1
        return folded

    def made(self, model: ir.Model) -> int:
        """Norms whose weight is folded."""
        return sum(node.op_type == "LayerNormalization" and _is_folded(node.inputs[1]) for node in model.graph)

    def ensures(self, model: ir.Model) -> None:
        """Two norms of each layer and the final one have a folded weight."""
        found, layers = self.made(model), layers_of(model.graph)
        if found != 2 * layers + 1:
            raise self.fail(f"folded {found} norms where {layers} layers have {2 * layers + 1}")


def _is_folded(scale: ir.Value | None) -> bool:
    return scale is not None and is_weight(scale) and origin_of(scale).plus_one
