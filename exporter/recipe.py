"""How an initializer comes from the checkpoint: which tensor, and what is done to it on the way.

Passes rewrite recipes instead of weights, so no weight is in memory until it is written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    import torch

_KEY = "nemotron.recipe"


@dataclass(frozen=True)
class Recipe:
    """An initializer's source: a checkpoint tensor, with one added (LayerNorm1P) or transposed where a flag says so."""

    tensor: str
    plus_one: bool = False
    transposed: bool = False

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the checkpoint's tensor must have for an initializer of this shape."""
        return shape[::-1] if self.transposed else shape

    def apply(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Turn the stored tensor into the initializer, contiguous, in this dtype.

        The one is added in fp32: in bf16 the sum would lose up to 4e-3 of the norm's weight.
        """
        result = tensor.float() + 1.0 if self.plus_one else tensor
        return (result.t() if self.transposed else result).to(dtype).contiguous()


def recipe_of(value: ir.Value) -> Recipe:
    """The recipe of a weight initializer; a weight no pass has touched is the checkpoint's tensor of its name."""
    recipe = value.meta.get(_KEY)
    if isinstance(recipe, Recipe):
        return recipe
    assert value.name is not None
    return Recipe(value.name)


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is an initializer whose content comes from the checkpoint."""
    return value is not None and value.is_initializer() and value.const_value is None


def derive(value: ir.Value, suffix: str, *, plus_one: bool = False, transposed: bool = False) -> ir.Value:
    """The initializer that is `value` with more done to it; made once, found again on the next call."""
    graph = value.graph
    assert graph is not None
    assert value.shape is not None
    name = f"{value.name}.{suffix}"
    if name in graph.initializers:
        return graph.initializers[name]
    old = recipe_of(value)
    shape = ir.Shape(tuple(value.shape)[::-1]) if transposed else value.shape.copy()
    derived = ir.Value(name=name, shape=shape, type=value.type)
    derived.meta[_KEY] = replace(old, plus_one=old.plus_one or plus_one, transposed=old.transposed != transposed)
    graph.initializers.add(derived)
    return derived
