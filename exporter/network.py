"""A bundle's graph as a TensorRT network: capacity frozen, weights mapped instead of read, attention mended.

Imports neither torch nor transformers: it runs on the deployment machine.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from plugins.tensorrt_network import LOWER_RIGHT, Mended, NetworkMismatch, mend
from runtime.bundle import Bundle
from runtime.contract import INPUT_IDS, WRITE_INDICES
from runtime.errors import UserError
from runtime.manifest import MODEL
from runtime.tensorrt_api import Messages, logger

Change = Callable[[onnx.ModelProto], onnx.ModelProto]

CAPACITY = "capacity"  # the symbolic dimension of the caches


@dataclass
class ParsedNetwork:
    """An INetworkDefinition, and what must live as long as it: the builder, the parser and the mapped weights.

    Attributes:
        path: the ONNX file.
        operators: how many of each operator the ONNX graph has.
        scales: the scale of each Attention, by node name.
        plugins: the nodes that plugins compute, by name.
    """

    path: Path
    trt: Any
    builder: Any
    network: Any
    operators: Counter[str]
    scales: dict[str, float]
    plugins: dict[str, onnx.NodeProto]
    messages: Messages
    _weights: _Weights = field(repr=False)
    _alive: list[Any] = field(repr=False)

    def mend(self, causality: str = LOWER_RIGHT) -> Mended:
        """Make the network mean what the graph means; see `plugins.tensorrt_network.mend`.

        Raises:
            UserError: the parser made something else of the graph than what is known here.
        """
        try:
            mended = mend(
                self.trt,
                self.network,
                operators=self.operators,
                scales=self.scales,
                causality=causality,
                input_ids=INPUT_IDS,
                write_indices=WRITE_INDICES,
            )
        except NetworkMismatch as error:
            raise UserError(
                f"{self.trt.__name__} {self.trt.__version__}: {error}; install a version that this tool was tested "
                "with (see its README)"
            ) from error
        self._alive.append(mended)
        return mended

    def release_pages(self) -> None:
        """Let the mapped weights leave memory; they are read again from the file when they are needed."""
        self._weights.release_pages()


def parse(trt: Any, bundle: Bundle, capacity: int, change: Change | None = None) -> ParsedNetwork:
    """Parse a bundle's graph with its caches' capacity frozen; nothing is mended yet.

    Args:
        trt: TensorRT's module, from `runtime.tensorrt_api`.
        bundle: a bundle of target `tensorrt`.
        capacity: positions that the caches hold.
        change: what is done to the graph before it is parsed; its weights stay in their files.

    Raises:
        UserError: the graph cannot be read or parsed.
    """
    path = bundle.file(MODEL)
    model = _frozen(path, capacity)
    if change is not None:
        model = change(model)
    messages = Messages()
    log = logger(trt, messages)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    weights = _Weights(path.parent)
    parsed = parser.load_model_proto(model.SerializeToString(), str(path))
    for tensor in model.graph.initializer if parsed else ():
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            parsed = parsed and parser.load_initializer(tensor.name, *weights.locate(tensor))
    if not (parsed and parser.parse_model_proto()):
        for error in map(parser.get_error, range(parser.num_errors)):
            messages.errors.append(f"{error.node_operator()} {error.node_name()}: {error.desc()}")
        raise UserError(
            f"{trt.__name__} {trt.__version__} cannot parse {path} ({messages.reason()}); "
            "export the bundle again, or upgrade TensorRT"
        )
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    scales = {node.name: attribute.f for node in attention for attribute in node.attribute if attribute.name == "scale"}
    operators = Counter(node.op_type for node in model.graph.node)
    plugins = {node.name: node for node in model.graph.node if node.domain}
    return ParsedNetwork(path, trt, builder, network, operators, scales, plugins, messages, weights, [parser, log])


def _frozen(path: Path, capacity: int) -> onnx.ModelProto:
    """The graph without its weights, every `capacity` replaced by a number: the native cache layer is static."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy or export the bundle again") from error
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == CAPACITY:
                dimension.dim_value = capacity
    return model


class _Weights:
    """External data mapped into memory: the parser takes addresses, so that no weight is copied."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, tuple[mmap.mmap, int]] = {}  # with the address

    def locate(self, tensor: onnx.TensorProto) -> tuple[int, int]:
        """A tensor's address and length in bytes.

        Raises:
            UserError: the file is shorter than the graph says.
        """
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name = entries["location"]
        offset, length = int(entries.get("offset", 0)), int(entries["length"])
        path = self._directory / name
        if name not in self._files:
            if not path.resolve().is_relative_to(self._directory.resolve()) or not path.is_file():
                raise UserError(f"{tensor.name} lies in {path}, which is not in the bundle; export the bundle again")
            self._files[name] = _map(path)
        mapped, address = self._files[name]
        if offset + length > len(mapped):
            raise UserError(f"{path} ends before {tensor.name}; copy or export the bundle again")
        return address + offset, length

    def release_pages(self) -> None:
        """Give the pages back to the system, where it takes them."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped, _ in self._files.values():
                mapped.madvise(mmap.MADV_DONTNEED)


def _map(path: Path) -> tuple[mmap.mmap, int]:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return mapped, np.frombuffer(mapped, np.uint8).ctypes.data
