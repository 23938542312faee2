"""A bundle's graph cut at the residual stream: what comes ahead of the layers, each layer, and the head.

A segment is run by itself, so that no more than its own weights need be in memory; the head's matrix is fed to it in
slices of the vocabulary. Segments run on ONNX Runtime, or are evaluated with every edge rounded to its dtype.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import onnx_ir as ir
import torch

from exporter import __version__
from exporter.evaluate.onnx_graph import compile_graph
from exporter.evaluate.program import Program
from exporter.evaluate.tensors import as_torch, read_tensor
from runtime.bundle import Bundle
from runtime.contract import LOGITS, present_names
from runtime.errors import UserError
from runtime.manifest import MODEL
from runtime.ort_model import OrtModel, import_onnxruntime, load_model

Tensor = torch.Tensor

SLICE_BYTES = 1 << 25  # of the head's matrix in fp32 that is in memory at once
_INPUT_NORM = re.compile(r"model\.layers\.(\d+)\.input_layernorm\.weight(\..+)?")
_FINAL_NORM = re.compile(r"model\.norm\.weight(\..+)?")
_BETWEEN = ("Cast", "GatherND")  # what stands between the residual stream and a norm: rounding, and the choice of rows
# Which axis of an operator's weights is the vocabulary.
_VOCABULARY_AXIS = {"MatMul": -1, "DequantizeLinear": -1, "MatMulNBits": 0, "FusedMatMul": 0, "Transpose": 0}


class Segment(Protocol):
    """A part of a graph; what it gives has the graph's dtypes."""

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run it on the tensors that it reads; others are passed over."""
        ...


class Segments:
    """A graph with a cache, in parts that are run one after the other.

    Attributes:
        name: what runs them, and its version, as in results.
        layers: how many decoder layers there are.
        ends_kept: whether the last layer gives its output for the columns alone whose logits are asked for.
        evaluated: whether every edge is rounded and looked at.
        non_finite: the edges that were not finite so far, where segments are evaluated.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        evaluate: bool,
        model: ir.Model | None = None,
        network: tuple[str, Program] | None = None,
    ) -> None:
        """Find the cuts; no weight is read.

        Args:
            bundle: of text generation with a cache.
            evaluate: round every edge to its dtype, instead of running ONNX Runtime's kernels.
            model: the bundle's graph, where the caller has it, with nodes of its own.
            network: what TensorRT's parser made of the graph, to be evaluated in its place, and its name. Its edges
                have the graph's names; its head is not cut.

        Raises:
            UserError: the graph is not of decoder layers that can be told apart.
        """
        self._bundle, self.evaluated = bundle, evaluate
        self._model = model or ir.load(bundle.file(MODEL))
        self._network = network
        self.layers = bundle.cache_geometry.layers
        self._stream = _residual_stream(self._model.graph, self.layers, bundle)
        before, after = self._stream[-2:]
        last = ir.convenience.extract(self._model.graph, [before, *self._model.graph.inputs], [after])
        self.ends_kept = any(node.op_type == "GatherND" for node in last)
        self.non_finite: list[str] = []
        self.name = f"nemotron-export evaluation of the ONNX graph {__version__}"
        if network is not None:
            self.name, _ = network
        elif not evaluate:
            self.name = f"onnxruntime-cpu {import_onnxruntime().__version__}"

    def stream_name(self, layer: int) -> str:
        """The residual stream that goes into a layer, or, after the last, into the head."""
        return str(self._stream[layer].name)

    def embedding(self) -> Segment:
        """From the graph's inputs to the first layer's."""
        return self.between(None, [self.stream_name(0)])

    def layer(self, layer: int) -> Segment:
        """From a layer's input and cache to the next one's input and its cache."""
        outputs = [self.stream_name(layer + 1), *present_names(layer)]
        return self.between(self.stream_name(layer), outputs)

    def vocabulary(self, hidden: int) -> list[slice]:
        """The runs of the vocabulary that the head is cut into, by the width of what it reads."""
        step = max(2, SLICE_BYTES // (4 * hidden) // 2 * 2)
        vocab = self._bundle.vocab_size
        return [slice(start, min(start + step, vocab)) for start in range(0, vocab, step)]

    def head(self, hidden: int) -> Iterator[tuple[slice, Segment]]:
        """From the last layer's output to the logits, a run of the vocabulary at a time; see `vocabulary`."""
        if self._network is not None:
            yield slice(0, self._bundle.vocab_size), self.between(self.stream_name(self.layers), [LOGITS])
            return
        for part in self.vocabulary(hidden):
            weights = {
                str(value.name): read_tensor(value.const_value, part, axis).contiguous()
                for value, axis in self._head_weights.items()
                if value.const_value is not None
            }
            yield part, self._head(weights)

    @cached_property
    def _head_weights(self) -> dict[ir.Value, int]:
        """The initializers that the vocabulary's product reads, and which of their axes is the vocabulary."""
        logits = next(value for value in self._model.graph.outputs if value.name == LOGITS)
        inputs = [self._stream[-1], *self._model.graph.inputs]
        found: dict[ir.Value, int] = {}
        for node in ir.convenience.extract(self._model.graph, inputs, [LOGITS]):
            for value in node.inputs if node.op_type in _VOCABULARY_AXIS else ():
                named = None if value is None else self._model.graph.initializers.get(value.name or "")
                axis = _VOCABULARY_AXIS[node.op_type]
                if named is not None and named.shape is not None and named.shape[axis] == self._bundle.vocab_size:
                    found[named] = axis
        if not found:
            raise UserError(f"{self._bundle.path}: no product makes {logits.name} of weights; export the bundle again")
        return found

    def _head(self, weights: Mapping[str, Tensor]) -> Segment:
        """The head with these weights, which are fed; or in its graph, where its operator takes no others."""
        given = self.stream_name(self.layers)
        if self.evaluated:
            return _Evaluated(self._program.between([given], [LOGITS]), self.non_finite, weights)
        if any("N" in node.attributes for value in self._head_weights for node in value.consumers()):
            return self._on_onnxruntime(given, [LOGITS], weights)
        return replace(self._fed_head, weights=weights)

    @cached_property
    def _fed_head(self) -> _OnOnnxRuntime:
        return self._on_onnxruntime(self.stream_name(self.layers), [LOGITS], {}, fed=list(self._head_weights))

    def between(self, given: str | None, outputs: Sequence[str]) -> Segment:
        """From a point of the residual stream, or the graph's inputs alone, to any of the graph's values by name."""
        if self.evaluated:
            names = [] if given is None else [given]
            return _Evaluated(self._program.between(names, outputs), self.non_finite, {})
        return self._on_onnxruntime(given, outputs, {})

    def _on_onnxruntime(
        self, given: str | None, outputs: Sequence[str], weights: Mapping[str, Tensor], fed: Sequence[ir.Value] = ()
    ) -> _OnOnnxRuntime:
        """A part of the graph as a model of its own.

        Args:
            given: the residual stream that it begins with; None for the graph's inputs alone.
            outputs: what it gives.
            weights: content of initializers that are cut to a run of the vocabulary.
            fed: initializers that are inputs instead.
        """
        source = self._model.graph
        inputs = [*(value for value in self._stream if value.name == given), *source.inputs, *fed]
        graph = ir.convenience.extract(source, inputs, list(outputs))
        for value in fed:
            own = graph.initializers.pop(str(value.name))
            own.shape = None  # of some of the vocabulary
        for name, content in weights.items():
            value = graph.initializers[name]
            value.const_value, value.shape = ir.Tensor(content.numpy(), name=name), ir.Shape(content.shape)
            for node in value.consumers():
                if "N" in node.attributes:
                    node.attributes["N"] = ir.AttrInt64("N", len(content))
        for unused in [value for value in graph.inputs if not value.uses()]:
            graph.inputs.remove(unused)
        model = ir.Model(graph, ir_version=self._model.ir_version)
        model.opset_imports.update(self._model.opset_imports)
        loaded = load_model(self._bundle, "cpu", None, ir.to_proto(model).SerializeToString())
        return _OnOnnxRuntime(loaded, [str(value.name) for value in graph.inputs], {})

    @cached_property
    def _program(self) -> Program:
        return compile_graph(self._model) if self._network is None else self._network[1]


@dataclass(frozen=True)
class _Evaluated:
    program: Program
    non_finite: list[str]
    weights: Mapping[str, Tensor]

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = self.program.run({**feeds, **self.weights})
        self.non_finite.extend(result.non_finite)
        return result.outputs


@dataclass(frozen=True)
class _OnOnnxRuntime:
    loaded: OrtModel
    inputs: Sequence[str]
    weights: Mapping[str, Tensor]

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        feeds = {**feeds, **self.weights}
        names = [value.name for value in self.loaded.model.get_outputs()]
        arrays = {name: feeds[name].contiguous().numpy() for name in self.inputs if name in feeds}
        with self.loaded.running("a layer"):
            found = self.loaded.model.run(names, arrays)
        return {name: as_torch(array) for name, array in zip(names, found, strict=True)}


def _residual_stream(graph: ir.Graph, layers: int, bundle: Bundle) -> list[ir.Value]:
    """What goes into each layer's first norm, and last into the final one."""
    found: dict[int, ir.Value] = {}
    for node in graph:
        scale = node.inputs[1] if node.op_type == "LayerNormalization" else None
        if scale is None:
            continue
        name = str(scale.name)
        place = _INPUT_NORM.fullmatch(name)
        if place or _FINAL_NORM.fullmatch(name):
            found[int(place[1]) if place else layers] = _behind(node.inputs[0])
    if sorted(found) != list(range(layers + 1)):
        raise UserError(f"{bundle.path}: the norms of {layers} layers are not told apart; export the bundle again")
    return [found[layer] for layer in sorted(found)]


def _behind(value: ir.Value | None) -> ir.Value:
    """The residual stream that a norm reads, ahead of rounding and choice."""
    assert value is not None
    producer = value.producer()
    while producer is not None and producer.op_type in _BETWEEN:
        value = producer.inputs[0]
        assert value is not None
        producer = value.producer()
    return value
