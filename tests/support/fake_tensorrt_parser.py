"""A `tensorrt` that parses a graph into layers without attributes, and looks plugins up as its parser does."""

from __future__ import annotations

from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
from fake_tensorrt_plugin import DataType, FakeTensorRTPlugin

LayerType = Enum("LayerType", ["ATTENTION_INPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING", "PLUGIN_V3", "OTHER"])
NATIVE = {"TensorScatter": LayerType.KV_CACHE_UPDATE, "RotaryEmbedding": LayerType.ROTARY_EMBEDDING}


class Layer:
    def __init__(self, node: onnx.NodeProto, kind: LayerType) -> None:
        self.name, self.type = node.name, kind
        self._inputs, self._outputs = ([SimpleNamespace(name=n) for n in names] for names in (node.input, node.output))
        self.num_inputs, self.num_outputs = len(self._inputs), len(self._outputs)

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


class Network:
    def __init__(self) -> None:
        self.inputs: list[Any] = []
        self.layers: list[Layer] = []

    num_inputs = property(lambda self: len(self.inputs))
    num_layers = property(lambda self: len(self.layers))

    def get_input(self, index: int) -> Any:
        return self.inputs[index]

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


class FakeTensorRTParser(ModuleType):
    """The module; `parsed` is the last graph that was parsed."""

    LayerType, DataType = LayerType, DataType

    def __init__(self, version: str = "11.4.0.1") -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.plugin = FakeTensorRTPlugin()
        self.parsed: onnx.ModelProto

        class ILogger:
            Severity = SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal error", WARNING="warning", INFO="info")

        self.ILogger = ILogger

    def Builder(self, log: Any) -> Any:  # noqa: N802 - TensorRT's name
        return SimpleNamespace(create_network=lambda flags: Network())

    def OnnxParser(self, network: Network, log: Any) -> Any:  # noqa: N802
        return Parser(self, network)


class Parser:
    def __init__(self, trt: FakeTensorRTParser, network: Network) -> None:
        self._trt, self._network = trt, network
        self._missing: set[str] = set()
        self._errors: list[Any] = []

    num_errors = property(lambda self: len(self._errors))

    def load_model_proto(self, content: bytes, path: str) -> bool:
        self._trt.parsed = onnx.ModelProto.FromString(content)
        external = (t.name for t in self._trt.parsed.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
        self._missing = set(external)
        return True

    def load_initializer(self, name: str, address: int, length: int) -> bool:
        self._missing.remove(name)
        return address > 0 and length > 0

    def parse_model_proto(self) -> bool:
        assert not self._missing, "weights without content"
        graph = self._trt.parsed.graph
        self._network.inputs = [SimpleNamespace(name=value.name) for value in graph.input]
        for node in graph.node:
            kind = NATIVE.get(node.op_type, LayerType.OTHER)
            if node.domain:
                kind = self._plugin(node)
            self._network.layers.append(Layer(node, kind))
        return not self._errors

    def _plugin(self, node: onnx.NodeProto) -> LayerType:
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        namespace = given.get("plugin_namespace", node.domain.encode()).decode()
        plugin = self._trt.plugin.plugins.get(f"{namespace}::{node.op_type}")
        strict = given.get("aot") == 1 and plugin is not None and plugin.aot_impl is not None
        if not strict or given.get("plugin_version", b"1") != b"1" or len(plugin.inputs) != len(node.input):
            self._errors.append(
                SimpleNamespace(
                    node_operator=lambda: node.op_type,
                    node_name=lambda: node.name,
                    desc=lambda: "Plugin not found, are the plugin name, version, and namespace correct?",
                )
            )
        return LayerType.PLUGIN_V3

    def get_error(self, index: int) -> Any:
        return self._errors[index]
