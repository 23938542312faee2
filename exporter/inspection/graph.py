"""A bundle's graph as it lies in `model.onnx`: nodes, tensors and their places, without the data file's content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.manifest import MODEL

if TYPE_CHECKING:
    import onnx

NEEDS_ONNX = "onnx is not installed; pip install onnx (nemotron-export[export], [tensorrt] and [rtx] bring it along)"

# As the command line and the manifest name dtypes.
_DTYPES = {
    "FLOAT": "fp32", "FLOAT16": "fp16", "BFLOAT16": "bf16", "DOUBLE": "fp64", "FLOAT8E4M3FN": "fp8",
}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """An operator. `outputs` are names; of `inputs` one that is left out is ''."""

    name: str
    domain: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]

    @property
    def qualified(self) -> str:
        """The operator with its domain, where it is not ONNX's own: `com.microsoft::MatMulNBits`."""
        return f"{self.domain}::{self.op_type}" if self.domain else self.op_type


@dataclass(frozen=True)
class Stored:
    """An initializer: its dtype ("fp32", "int4", …), shape, and bytes.

    `file` is the data file's name, with the tensor's first byte there, `offset`; None for one inside `model.onnx`.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str | None
    offset: int


@dataclass(frozen=True)
class Typed:
    """What is known of a value that is no initializer: its dtype, and a dimension that is symbolic as text."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphFacts:
    """A graph: nodes in their order, initializers and typed values by name, and what goes in and out."""

    nodes: tuple[Node, ...]
    initializers: Mapping[str, Stored]
    values: Mapping[str, Typed]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def consumers(self) -> dict[str, list[Node]]:
        """The nodes that read each value."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.inputs):
                found.setdefault(name, []).append(node)
        return found


def read_graph(bundle: Bundle, *, complete: bool = False) -> GraphFacts | None:
    """The graph of a bundle; None where onnx is not installed.

    Args:
        bundle: an opened one.
        complete: whether values that the graph does not describe get what can be inferred of them.

    Raises:
        UserError: `model.onnx` is none.
    """
    try:
        import onnx
    except ModuleNotFoundError:
        return None
    from google.protobuf.message import DecodeError

    path = bundle.file(MODEL)
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{path} is no ONNX graph ({error}); copy or export the bundle again") from error
    graph = (onnx.shape_inference.infer_shapes(model) if complete else model).graph
    initializers = {tensor.name: _stored(tensor, path) for tensor in graph.initializer}
    described = (*graph.input, *graph.value_info, *graph.output)
    return GraphFacts(
        nodes=tuple(_node(node) for node in graph.node),
        initializers=initializers,
        values={value.name: _typed(value) for value in described if value.name not in initializers},
        inputs=tuple(value.name for value in graph.input if value.name not in initializers),
        outputs=tuple(value.name for value in graph.output),
    )


def _node(node: onnx.NodeProto) -> Node:
    from onnx import helper

    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return Node(node.name, node.domain, node.op_type, tuple(node.input), tuple(node.output), attributes)


def _stored(tensor: onnx.TensorProto, path: Path) -> Stored:
    from onnx import TensorProto

    shape = tuple(tensor.dims)
    if tensor.data_location != TensorProto.EXTERNAL:
        return Stored(dtype_name(tensor.data_type), shape, len(tensor.raw_data), None, 0)
    place = {entry.key: entry.value for entry in tensor.external_data}
    try:
        return Stored(
            dtype_name(tensor.data_type), shape, int(place["length"]), place["location"], int(place.get("offset", 0))
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{path} does not say where the data of {tensor.name} lies ({error!r}); export the bundle again"
        ) from error


def _typed(value: onnx.ValueInfoProto) -> Typed:
    tensor = value.type.tensor_type
    return Typed(dtype_name(tensor.elem_type), tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim))


def dtype_name(number: int) -> str:
    """A dtype of ONNX by the name that the command line has for it."""
    from onnx import TensorProto

    name = str(TensorProto.DataType.Name(number))
    return _DTYPES.get(name, name.lower())
