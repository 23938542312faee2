"""`tensorrt.plugin` in small, and a builder over it: NVIDIA's own is not installed where the fast tests run.

What it holds on to: annotations are classes and not text; signatures are the registered ones; a combination names a
type for every tensor; a symbol outside shape inference is a fake; extra arguments are symbols of 32 bit, the kernel is
text or bytes.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

from fake_tensorrt_symbols import (
    DimensionExpr,
    ShapeExpr,
    ShapeExprs,
    Sizes,
    SymExprs,
    SymInt32,
    SymIntExprs,
    inference,
    symbols,
)

DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64"])
NAMES = {"FP32": DataType.FLOAT, "FP16": DataType.HALF, "BF16": DataType.BF16, "INT32": DataType.INT32}


@dataclass(frozen=True)
class Shape:
    """A concrete shape; -1 where the profile leaves it open."""

    dims: tuple[int, ...]
    best: tuple[int, ...]

    @property
    def is_dynamic(self) -> bool:
        return -1 in self.dims

    @property
    def opt(self) -> tuple[int, ...]:
        if not self.is_dynamic:
            raise ValueError("opt property is only accessible if is_dynamic is true")
        return self.best

    def __iter__(self) -> Any:
        return iter(self.dims)

    def __len__(self) -> int:
        return len(self.dims)


@dataclass
class TensorDesc:
    shape_expr: ShapeExprs
    dtype: DataType
    known: Shape | None = None

    @property
    def shape(self) -> Shape:
        if self.known is None:
            raise ValueError("TensorDesc has no shape information available at this stage")
        return self.known


class KernelLaunchParams:
    NAMES = ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared_mem")

    def __init__(self) -> None:
        for name in self.NAMES:
            setattr(self, name, 0 if name == "shared_mem" else 1)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.NAMES:
            raise AttributeError(f"KernelLaunchParams object has no attribute '{name}'")
        self.__dict__[name] = SymInt32(value)


class AutoTuneCombination:
    def __init__(self, io_types: str, layouts: str = "LINEAR", tactics: Sequence[int] = ()) -> None:
        assert layouts == "LINEAR"
        assert all(tactic > 0 for tactic in tactics), "a custom tactic is above 0"
        self.types = [NAMES[name.strip()] for name in io_types.split(",")]
        self.tactics = list(tactics)


@dataclass
class Plugin:
    describe: Callable[..., Any]
    inputs: list[str]
    outputs: int
    autotune: Callable[..., Any] | None = None
    aot_impl: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Launch:
    """A kernel as the engine keeps it."""

    name: str
    code: str | bytes
    params: dict[str, DimensionExpr]
    extra: tuple[DimensionExpr, ...]


@dataclass
class Built:
    """What a builder learnt of a plugin: its outputs, and a launch for each tactic."""

    dtypes: list[DataType]
    shapes: list[list[DimensionExpr]]
    launches: dict[int, Launch] = field(default_factory=dict)


class FakeTensorRTPlugin(ModuleType):
    """The module."""

    TensorDesc, KernelLaunchParams, AutoTuneCombination = TensorDesc, KernelLaunchParams, AutoTuneCombination
    SymInt32, SymIntExprs, ShapeExpr, ShapeExprs = SymInt32, SymIntExprs, ShapeExpr, ShapeExprs

    def __init__(self) -> None:
        super().__init__("tensorrt.plugin")
        self.plugins: dict[str, Plugin] = {}

    # registration
    def register(self, name: str, lazy_register: bool = False) -> Callable[..., Any]:
        namespace, plugin = name.split("::")
        assert namespace not in {"", "trt", "tensorrt", "std"}
        assert "." not in namespace + plugin

        def take(function: Callable[..., Any]) -> Callable[..., Any]:
            if name in self.plugins:
                raise ValueError(f"already has a definition for {name}")
            signature = inspect.signature(function)
            for parameter in signature.parameters.values():
                assert issubclass(parameter.annotation, TensorDesc), "attributes do not come through NumPy 2.4"
                assert parameter.default is parameter.empty
            returned = signature.return_annotation
            outputs = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
            assert all(issubclass(each, TensorDesc) for each in outputs)
            self.plugins[name] = Plugin(function, list(signature.parameters), len(outputs))
            return function

        return take

    def autotune(self, name: str) -> Callable[..., Any]:
        def take(function: Callable[..., Any]) -> Callable[..., Any]:
            returned = self._checked(name, function, ["outputs"])
            assert typing.get_origin(returned) is list
            assert issubclass(typing.get_args(returned)[0], AutoTuneCombination)
            self.plugins[name].autotune = function
            return function

        return take

    def aot_impl(self, name: str) -> Callable[..., Any]:
        def take(function: Callable[..., Any]) -> Callable[..., Any]:
            returned = self._checked(name, function, ["outputs", "tactic"])
            kernel, code, params, extra = typing.get_args(returned)
            assert kernel in {str, bytes}
            assert code in {str, bytes}
            assert issubclass(params, KernelLaunchParams)
            assert issubclass(extra, SymExprs)
            self.plugins[name].aot_impl = function
            return function

        return take

    def _checked(self, name: str, function: Callable[..., Any], more: list[str]) -> Any:
        if name not in self.plugins:
            raise ValueError(f"Plugin {name} is not registered")
        signature = inspect.signature(function)
        assert list(signature.parameters) == [*self.plugins[name].inputs, *more]
        for parameter in signature.parameters.values():
            if parameter.name == "outputs":
                assert typing.get_origin(parameter.annotation) is tuple
            else:
                assert issubclass(parameter.annotation, int if parameter.name == "tactic" else TensorDesc)
        return signature.return_annotation

    # symbols
    @staticmethod
    def _symbol(first: Any, second: Any, function: Callable[[int, int], int]) -> Any:
        if isinstance(first, int) and isinstance(second, int):
            raise ValueError("Both arguments cannot be 'int's")
        return (ShapeExpr(first) if isinstance(first, int) else first).op(function, second)

    def cdiv(self, first: Any, second: Any) -> Any:
        return self._symbol(first, second, lambda a, b: -(-a // b))

    def max(self, first: Any, second: Any) -> Any:
        return self._symbol(first, second, max)

    def min(self, first: Any, second: Any) -> Any:
        return self._symbol(first, second, min)

    def from_shape_expr(self, shape: Any, dtype: DataType) -> TensorDesc:
        assert isinstance(shape, tuple)
        return TensorDesc(ShapeExprs.of(shape), dtype)

    # the builder
    def build(self, name: str, shapes: Sequence[Sequence[int | str]], dtypes: Sequence[DataType], best: Sizes) -> Built:
        """What a builder asks of a plugin, in its order.

        Args:
            name: the plugin's.
            shapes: of the inputs; a name stands for a dimension that a profile leaves open.
            dtypes: of the inputs.
            best: the profile's opt.
        """
        plugin = self.plugins[name]
        assert plugin.autotune is not None
        assert plugin.aot_impl is not None
        fakes = [
            TensorDesc(ShapeExprs.of([ShapeExpr() for _ in dims]), t) for dims, t in zip(shapes, dtypes, strict=True)
        ]
        assert len(fakes) == len(plugin.inputs)
        types = [out.dtype for out in self._outputs(plugin, fakes)]
        with inference():
            inputs = [TensorDesc(symbols(dims), t) for dims, t in zip(shapes, dtypes, strict=True)]
            outputs = self._outputs(plugin, inputs)
            built = Built(types, [[dim() for dim in out.shape_expr] for out in outputs])
            assert [out.dtype for out in outputs] == types
        for desc, dims in zip(inputs, shapes, strict=True):
            desc.known = Shape(
                tuple(-1 if isinstance(dim, str) else dim for dim in dims),
                tuple(best[dim] if isinstance(dim, str) else dim for dim in dims),
            )
        (combination,) = plugin.autotune(*inputs, outputs)
        assert combination.types == [*dtypes, *types], "the types are not the network's"
        for tactic in combination.tactics:
            with inference():  # the symbols are still those of the one before
                built.launches[tactic] = launch(*plugin.aot_impl(*inputs, outputs, tactic))
        return built

    def _outputs(self, plugin: Plugin, inputs: list[TensorDesc]) -> tuple[TensorDesc, ...]:
        found = plugin.describe(*inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        assert len(outputs) == plugin.outputs
        return outputs


def launch(name: Any, code: Any, params: Any, extra: Any) -> Launch:
    assert isinstance(name, str | bytes)
    assert isinstance(code, str | bytes)
    assert isinstance(params, KernelLaunchParams)
    assert isinstance(extra, SymExprs)
    assert all(isinstance(each, SymInt32) for each in extra)
    numbers = {each: getattr(params, each)() for each in params.NAMES}
    return Launch(str(name), code, numbers, tuple(each() for each in extra))
