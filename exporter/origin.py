"""How an initializer comes from the checkpoint: which tensor, and what is done to it on the way.

Passes rewrite origins instead of weights, so no weight is in memory until it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx_ir as ir

from exporter.rounding import Rounding
from exporter.tensor_slices import empty

if TYPE_CHECKING:
    import torch

_KEY = "nemotron.origin"


@dataclass(frozen=True)
class Origin:
    """An initializer's source: a checkpoint tensor, with one added (LayerNorm1P) or transposed where a flag says so."""

    tensor: str
    plus_one: bool = False
    transposed: bool = False

    def source_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the checkpoint's tensor must have for an initializer of this shape."""
        return shape[::-1] if self.transposed else shape

    def apply(
        self,
        tensor: torch.Tensor,
        dtype: torch.dtype,
        scale: Callable[[str, torch.Tensor], torch.Tensor] = lambda _, tensor: tensor,
    ) -> torch.Tensor:
        """Turn the stored tensor, or some of its rows, into the initializer, or its rows or columns, in this dtype.

        The one is added in fp32: in bf16 the sum would lose up to 4e-3 of the norm's weight. Then the parameter is
        scaled, as `exporter.scaling.Scaling.apply` does. What comes out is contiguous.
        """
        result = scale(self.tensor, tensor.float() + 1.0 if self.plus_one else tensor)
        if self.transposed:
            result = empty(tuple(result.shape)[::-1], result.dtype).copy_(result.t())  # cheaper before a wider dtype
        if result.dtype != dtype or not result.is_contiguous():
            result = empty(tuple(result.shape), dtype).copy_(result)
        return result


@dataclass(frozen=True)
class Part:
    """An initializer that is one part of a rounded matrix [out_features, in_features]."""

    matrix: Origin
    rounding: Rounding
    name: str


def origin_of(value: ir.Value) -> Origin:
    """The origin of a weight initializer; a weight no pass has touched is the checkpoint's tensor of its name."""
    origin = value.meta.get(_KEY)
    if isinstance(origin, Origin):
        return origin
    assert value.name is not None
    return Origin(value.name)


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
    old = origin_of(value)
    shape = ir.Shape(tuple(value.shape)[::-1]) if transposed else value.shape.copy()
    derived = ir.Value(name=name, shape=shape, type=value.type)
    derived.meta[_KEY] = replace(old, plus_one=old.plus_one or plus_one, transposed=old.transposed != transposed)
    graph.initializers.add(derived)
    return derived


def twin(value: ir.Value, prefix: str, own: str) -> ir.Value:
    """Another layer's initializer: what is done to this one's tensor, of the name with `own` in place of `prefix`."""

    def renamed(name: str) -> str:
        return own + name.removeprefix(prefix)

    assert value.name is not None
    assert value.shape is not None
    made = ir.Value(name=renamed(value.name), shape=value.shape.copy(), type=value.type)
    origin = origin_of(value)
    made.meta[_KEY] = replace(origin, tensor=renamed(origin.tensor))
    return made


def part_of(value: ir.Value) -> Part | None:
    """Of which rounded matrix an initializer is a part; None for a weight that is whole."""
    part = value.meta.get(_KEY)
    return part if isinstance(part, Part) else None


def derive_parts(value: ir.Value, rounding: Rounding, scales: ir.DataType) -> dict[str, ir.Value]:
    """The initializers that stand for a matrix [out, in], or its transpose, once it is rounded; made once.

    Raises:
        UserError: the target cannot take a matrix of this shape.
    """
    graph = value.graph
    assert graph is not None
    assert value.shape is not None
    origin = origin_of(value)
    shape = origin.source_shape(tuple(int(dim) for dim in value.shape.numpy()))
    parts = {}
    for name, (dtype, dims) in rounding.parts(shape).items():
        full = f"{value.name}.{name}"
        if full not in graph.initializers:
            part = ir.val(full, dtype=ir.DataType[dtype] if dtype else scales, shape=dims)
            part.meta[_KEY] = Part(replace(origin, transposed=False), rounding, name)
            graph.initializers.add(part)
        parts[name] = graph.initializers[full]
    return parts
