"""Stands for TensorRT's C++ before its own Python, in a process of its own: parser, builder, and what they hand over.

    python tensorrt_builder.py PACKAGES STUBS QUESTION ANSWER

PACKAGES has `tensorrt_bindings`, STUBS the libraries that it links against and the package `tensorrt`. QUESTION is a
JSON object: `bundle`, `capability`, `dtype` ("HALF"), `profiles` (by name: batch, sequence and capacity, each as least,
best and most, or as one number where the network fixes it), `steps` (a list of batch, sequence, capacity). The answer
is a JSON object in the file ANSWER.

The plugins, their creators and what they are given and give back are NVIDIA's, as far as Python can construct it. What
it cannot is here: the registry, the builder of expressions over dimensions and the expressions, and the two objects
that a launch is written into. The order is that of NvInferPythonPlugin.h (NVIDIA/TensorRT), and of
`importPluginCreator`, `loadFields` and `createPlugin` (onnx/onnx-tensorrt).
"""

from __future__ import annotations

import ctypes
import json
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx

PACKAGES, STUBS, QUESTION = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
STEPS = [dict(zip(("batch", "sequence", "capacity"), step, strict=True)) for step in QUESTION["steps"]]
sys.path[:0] = [str(Path(__file__).parents[2]), str(STUBS), PACKAGES]
for library in STUBS.glob("*.so.11"):
    ctypes.CDLL(str(library))  # the loader takes what is loaded under the name that is asked for
bindings = import_module("tensorrt_bindings")

from exporter.engine_options import BuildOptions  # noqa: E402 - of this repository, wherever it is installed
from exporter.plugin_attention import KernelPlugins  # noqa: E402
from runtime.bundle import Bundle  # noqa: E402


class DimsExprs(bindings.DimsExprs):
    """NVIDIA's, which C++ reads: what Python wrote into it is kept."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.written: list[Any] = [None] * length

    def __setitem__(self, index: int, value: Any) -> None:
        super().__setitem__(index, value)
        self.written[index] = value


class ISymExpr(bindings.ISymExpr):
    """As above."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        self.__dict__.setdefault("written", {})[name] = value


trt = import_module("tensorrt")
trt.DimsExprs, trt.ISymExpr = DimsExprs, ISymExpr
POSITIONS = 4096
MARKS = ("plugin_namespace", "plugin_version", "aot")  # what the parser reads of a node
OPERATIONS = {
    "SUM": operator.add, "SUB": operator.sub, "PROD": operator.mul, "MAX": max, "MIN": min,
    "FLOOR_DIV": operator.floordiv, "CEIL_DIV": lambda first, second: -(-first // second),
}  # fmt: skip


class Expression(bindings.IDimensionExpr):
    """A value that follows from the sizes of a step. C++ alone calls the constructor of what it stands for."""

    at: Callable[[dict[str, int]], int]
    fixed: bool

    @classmethod
    def of(cls, at: Callable[[dict[str, int]], int], fixed: bool) -> Expression:
        made = cls.__new__(cls)
        made.at, made.fixed = at, fixed
        return made


class ExprBuilder:
    """IExprBuilder, of use until a call of the plugin returns."""

    gone = False

    def constant(self, value: int) -> Expression:
        assert not self.gone, "an expression builder that is gone was asked for a constant"
        return Expression.of(lambda _: value, True)

    def operation(self, kind: Any, first: Expression, second: Expression) -> Expression:
        assert not self.gone, "an expression builder that is gone was asked for an operation"
        assert isinstance(first, Expression)
        assert isinstance(second, Expression)
        function = OPERATIONS[kind.name]
        return Expression.of(lambda sizes: function(first.at(sizes), second.at(sizes)), first.fixed and second.fixed)


@contextmanager
def expressions() -> Iterator[ExprBuilder]:
    builder = ExprBuilder()
    yield builder
    builder.gone = True


class Registry:
    """IPluginRegistry."""

    def __init__(self) -> None:
        self.creators: list[Any] = []

    def register_creator(self, creator: Any, namespace: str) -> bool:
        assert isinstance(creator, bindings.IPluginCreatorV3Quick)
        assert creator.plugin_namespace == namespace
        assert self.get_creator(creator.name, creator.plugin_version, namespace) is None, "registered twice"
        self.creators.append(creator)
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        wanted = (name, version, namespace)
        found = (each for each in self.creators if (each.name, each.plugin_version, each.plugin_namespace) == wanted)
        return next(found, None)


class LaunchParams:
    """IKernelLaunchParams."""

    def __setattr__(self, name: str, value: Any) -> None:
        assert hasattr(bindings.KernelLaunchParams, name)
        assert isinstance(value, ISymExpr)
        super().__setattr__(name, value)


class SymExprs(dict[int, Any]):
    """ISymExprs."""

    nbSymExprs = 0  # noqa: N815 - NVIDIA's name

    def read(self) -> list[Any]:
        assert sorted(self) == list(range(self.nbSymExprs))
        return [self[index] for index in range(self.nbSymExprs)]


@dataclass(frozen=True)
class Tensor:
    dims: list[Expression]
    dtype: Any

    def desc(self, profile: list[dict[str, int]]) -> Any:
        """DynamicPluginTensorDesc, linear."""
        made, inner = trt.DynamicPluginTensorDesc(), trt.PluginTensorDesc()
        inner.dims = [dim.at(profile[0]) if dim.fixed else -1 for dim in self.dims]
        inner.type, inner.format, inner.scale = self.dtype, trt.TensorFormat.LINEAR, -1.0
        made.desc = inner
        made.min, made.opt, made.max = ([dim.at(sizes) for dim in self.dims] for sizes in profile)
        return made


def size_of(value: ISymExpr, sizes: dict[str, int]) -> int:
    """A number that a kernel is launched with; TensorRT is told that it is an integer of 32 bit."""
    written = value.written
    assert (written["type"], written["dtype"]) == (trt.PluginArgType.INT, trt.PluginArgDataType.INT32)
    return int(written["expr"].at(sizes))


def created(registry: Registry, node: Any, attributes: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The plugin as the ONNX parser creates it, and what it saw of the creator."""
    namespace = attributes["plugin_namespace"].decode()
    creator = registry.get_creator(node.op_type, attributes["plugin_version"].decode(), namespace)
    declared = [field.name for field in creator.field_names]
    request = getattr(trt.QuickPluginCreationRequest, "STRICT_AOT" if attributes["aot"] else "STRICT_JIT")
    none, build = trt.PluginFieldCollection([]), trt.TensorRTPhase.BUILD
    plugin = creator.create_plugin(node.op_type, namespace, none, build, request)
    for kind in ("CORE", "BUILD"):
        assert plugin.get_capability_interface(getattr(trt.PluginCapabilityType, kind)) is plugin
    kinds = (trt.IPluginV3, trt.IPluginV3QuickCore, trt.IPluginV3QuickAOTBuild)
    assert all(isinstance(plugin, kind) for kind in kinds)
    assert (plugin.plugin_name, plugin.plugin_namespace, plugin.plugin_version) == (node.op_type, namespace, "1")
    return plugin, {"declared": declared, "unknown": unknown(creator, node.op_type, namespace, request)}


def unknown(creator: Any, name: str, namespace: str, request: Any) -> str:
    """What the creator says of a field that the plugin does not declare."""
    heads = np.array([4], np.int32)
    fields = trt.PluginFieldCollection([trt.PluginField("heads", heads, trt.PluginFieldType.INT32)])
    try:
        creator.create_plugin(name, namespace, fields, trt.TensorRTPhase.BUILD, request)
    except AssertionError as error:
        return str(error)
    return "taken"


def inferred(plugin: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs, as a network asks for them when a plugin is added, and once more at every change."""
    types = plugin.get_output_data_types([each.dtype for each in inputs], [len(each.dims) for each in inputs])
    assert all(isinstance(each, bindings.DataType) for each in types)
    for _ in range(2):
        with expressions() as builder:
            shapes = plugin.get_output_shapes([each.dims for each in inputs], [], builder)
    assert len(types) == len(shapes) == plugin.num_outputs
    assert all(isinstance(each, DimsExprs) for each in shapes)
    assert [plugin.get_aliased_input(index) for index in range(plugin.num_outputs)] == [-1] * plugin.num_outputs
    return [Tensor(shape.written, dtype) for shape, dtype in zip(shapes, types, strict=True)]


def timed(plugin: Any, inputs: list[Tensor], outputs: list[Tensor], profile: list[dict[str, int]]) -> dict[str, Any]:
    """Combinations of types and formats, each with its tactics, and what is launched for each of them."""
    plugin, count = plugin.clone(), len(inputs)
    descs = [each.desc(profile) for each in (*inputs, *outputs)]
    for _ in range(2):  # how many there are, then which
        flat = plugin.get_supported_format_combinations(descs, count)
    assert len(flat) == len(descs), "more than one combination of types"
    plugin.configure_plugin(descs[:count], descs[count:])
    tactics = plugin.get_valid_tactics()
    assert all(type(tactic) is int for tactic in tactics)
    return {
        "types": [each.type.name for each in flat],
        "formats": sorted({each.format.name for each in flat}),
        "launches": {tactic: launched(plugin, tactic, inputs, descs) for tactic in tactics},
    }


def launched(plugin: Any, tactic: int, inputs: list[Tensor], descs: list[Any]) -> dict[str, Any]:
    plugin, count = plugin.clone(), len(inputs)
    plugin.set_tactic(tactic)
    params, extra = LaunchParams(), SymExprs()
    with expressions() as builder:
        plugin.get_launch_params([each.dims for each in inputs], descs, count, params, extra, builder)
    name, code = plugin.get_kernel([each.desc for each in descs[:count]], [each.desc for each in descs[count:]])
    assert type(code) is bytes
    numbers = {key: [size_of(value, sizes) for sizes in STEPS] for key, value in vars(params).items()}
    extras = [[size_of(value, sizes) for value in extra.read()] for sizes in STEPS]
    return {"name": name, "code": code.decode(), "params": numbers, "extra": extras}


def network_of(attributes: dict[str, Any], sizes: dict[str, int | list[int]]) -> list[Tensor]:
    """SplitAttention's inputs; what a profile leaves open is a symbol."""

    def dim(of: int | str) -> Expression:
        size = sizes[of] if isinstance(of, str) else of
        if isinstance(size, list):
            return Expression.of(lambda step: step[of], False)
        return Expression.of(lambda _: size, True)

    half, width = getattr(trt.DataType, QUESTION["dtype"]), attributes["head_dim"]
    table = [POSITIONS, attributes["rotary_dim"] // 2]
    cache = ["batch", attributes["kv_heads"], "capacity", width]
    shapes = [["batch", "sequence", attributes["heads"] * width], table, table, cache, cache, ["batch"]]
    types = [half] * 5 + [trt.DataType.INT32]
    return [Tensor([dim(each) for each in dims], dtype) for dims, dtype in zip(shapes, types, strict=True)]


def layers(registry: Registry, nodes: list[Any], sizes: dict[str, int | list[int]]) -> list[dict[str, Any]]:
    """What TensorRT has of each plugin's node, for one profile."""
    ranges = {name: size if isinstance(size, list) else [size] * 3 for name, size in sizes.items()}
    profile = [{name: each[which] for name, each in ranges.items()} for which in range(3)]
    tensors: dict[str, Tensor] = {}
    made = []
    for node in nodes:
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        plugin, seen = created(registry, node, attributes)
        if node.op_type == "SplitAttention":
            tensors |= dict(zip(node.input, network_of(attributes, sizes), strict=True))
        inputs = [tensors[name] for name in node.input]
        outputs = inferred(plugin, inputs)
        tensors |= dict(zip(node.output, outputs, strict=True))
        made.append(
            {
                "op": node.op_type,
                "attributes": {name: value for name, value in attributes.items() if name not in MARKS},
                "dtypes": [each.dtype.name for each in outputs],
                "shapes": [[[dim.at(step) for dim in each.dims] for each in outputs] for step in STEPS],
                **seen,
                **timed(plugin, inputs, outputs, profile),
            }
        )
    return made


def main() -> None:
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    bundle = Bundle.open(Path(QUESTION["bundle"]))
    kernels = KernelPlugins(trt, BuildOptions("tensorrt", attention="plugin"), QUESTION["capability"])
    model = onnx.load(bundle.file("model.onnx"), load_external_data=False)
    nodes = [node for node in kernels.rewritten(model, bundle).graph.node if node.domain]
    answer = {name: layers(registry, nodes, sizes) for name, sizes in QUESTION["profiles"].items()}
    told = {"version": trt.__version__, "creators": len(registry.creators), "profiles": answer}
    Path(sys.argv[4]).write_text(json.dumps(told))


main()
