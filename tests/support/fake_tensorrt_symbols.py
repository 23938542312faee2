"""Symbolic dimensions of `tensorrt.plugin`: fakes outside shape inference, which has a builder of expressions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class DimensionExpr:
    """IDimensionExpr: what it is at the sizes of a step."""

    at: Callable[[Sizes], int]


class ExprBuilder:
    """IExprBuilder."""

    def constant(self, value: int) -> DimensionExpr:
        return DimensionExpr(lambda _: value)

    def operation(self, function: Callable[[int, int], int], left: Any, right: Any) -> DimensionExpr:
        if not (isinstance(left, DimensionExpr) and isinstance(right, DimensionExpr)):
            raise TypeError("operation(): incompatible function arguments")
        return DimensionExpr(lambda sizes: function(left.at(sizes), right.at(sizes)))


class SymInt32:
    builder: ClassVar[ExprBuilder | None] = None  # of the inference that is going on

    def __init__(self, value: Any = None) -> None:
        self.expr: DimensionExpr | None = None
        if isinstance(value, int):
            self.expr = None if SymInt32.builder is None else SymInt32.builder.constant(value)
        elif isinstance(value, DimensionExpr):
            self.expr = value
        elif isinstance(value, SymInt32):
            self.expr = value.expr

    def op(self, function: Callable[[int, int], int], other: Any) -> SymInt32:
        if not isinstance(other, int | SymInt32):
            raise TypeError(f"{other!r} is no symbol")
        assert SymInt32.builder is not None, "an operation outside shape inference"
        other = SymInt32(other)
        return SymInt32(SymInt32.builder.operation(function, self.expr, other.expr))

    def __add__(self, other: Any) -> Any:
        return self.op(lambda a, b: a + b, other)

    def __sub__(self, other: Any) -> Any:
        return self.op(lambda a, b: a - b, other)

    def __mul__(self, other: Any) -> Any:
        return self.op(lambda a, b: a * b, other)

    def __floordiv__(self, other: Any) -> Any:
        return self.op(lambda a, b: a // b, other)

    def __call__(self) -> DimensionExpr:
        assert self.expr is not None, "a symbol without an expression"
        return self.expr


class ShapeExpr(SymInt32):
    def __init__(self, value: Any = None) -> None:
        super().__init__(value)
        self.is_fake = value is None or (isinstance(value, int) and SymInt32.builder is None)
        if isinstance(value, ShapeExpr):
            self.is_fake = value.is_fake

    def op(self, function: Callable[[int, int], int], other: Any) -> ShapeExpr:
        return ShapeExpr() if self.is_fake else ShapeExpr(super().op(function, other))


class SymExprs:
    kind: ClassVar[type] = SymInt32

    def __init__(self, length: int) -> None:
        self.values: list[Any] = [None] * length

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Any:
        return iter(self.values)

    def __getitem__(self, index: int) -> Any:
        return self.values[index]

    def __setitem__(self, index: int, value: Any) -> None:
        if not isinstance(value, int | self.kind):
            raise ValueError(f"value should be int or {self.kind.__name__}, found {type(value)}")
        self.values[index] = value if isinstance(value, self.kind) else self.kind(value)


class SymIntExprs(SymExprs):
    pass


class ShapeExprs(SymExprs):
    kind = ShapeExpr

    @classmethod
    def of(cls, values: Sequence[Any]) -> ShapeExprs:
        made = cls(len(values))
        for index, value in enumerate(values):
            made[index] = value
        return made


@contextmanager
def inference() -> Iterator[None]:
    """A context in which symbols are real."""
    SymInt32.builder = ExprBuilder()
    yield
    SymInt32.builder = None


def symbols(dims: Sequence[int | str]) -> ShapeExprs:
    def of(dim: int | str) -> ShapeExpr:
        return ShapeExpr(DimensionExpr(lambda sizes: sizes[dim] if isinstance(dim, str) else dim))

    return ShapeExprs.of([of(dim) for dim in dims])
