"""Hidden states and attention weights as outputs, where the export asks for them."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.origin import origin_of
from exporter.passes.base import GraphPass
from exporter.spec import NemotronSpec
from plugins.ops import is_partial_rope_self_attention
from runtime.contract import LAST_HIDDEN_STATE, attentions_name, hidden_states_name


class HandOutHiddenStates(GraphPass):
    """`hidden_states.0…L`: what goes into each layer, and what the final norm gives, as transformers counts them."""

    name: ClassVar[str] = "hand_out_hidden_states"

    def __init__(self, spec: NemotronSpec) -> None:
        self.spec = spec
        self.names = [hidden_states_name(index) for index in range(spec.layers + 1)]

    def apply(self, model: ir.Model) -> int:
        """Add the outputs, unless they are there."""
        graph = model.graph
        if any(value.name == self.names[0] for value in graph.outputs):
            return 0
        norms = {}
        for node in graph:
            scale = node.inputs[1] if node.op_type == "LayerNormalization" else None
            if scale is not None:
                norms[origin_of(scale).tensor] = node
        layers = [f"model.layers.{layer}.input_layernorm.weight" for layer in range(self.spec.layers)]
        missing = [name for name in (*layers, "model.norm.weight") if name not in norms]
        if missing:
            raise self.fail(f"no norm reads {missing[0]}")
        states = [*(norms[name].inputs[0] for name in layers), norms["model.norm.weight"].outputs[0]]
        for name, state in zip(self.names, states, strict=True):
            assert state is not None
            _hand_out(graph, state, name, ["batch", "sequence", self.spec.hidden])
        return len(states)


class HandOutAttentions(GraphPass):
    """`attentions.N` [batch, heads, sequence, sequence]: the weights of each layer's attention."""

    name: ClassVar[str] = "hand_out_attentions"

    def __init__(self, spec: NemotronSpec) -> None:
        self.spec = spec

    def apply(self, model: ir.Model) -> int:
        """Add the outputs, unless they are there."""
        graph = model.graph
        if any(value.name == attentions_name(0) for value in graph.outputs):
            return 0
        fused = [node for node in graph if is_partial_rope_self_attention(node)]
        for layer, node in enumerate(fused):
            weights = node.outputs[1]
            weights.dtype = ir.DataType.FLOAT
            _hand_out(graph, weights, attentions_name(layer), ["batch", self.spec.heads, "sequence", "sequence"])
        return len(fused)

    def ensures(self, model: ir.Model) -> None:
        """One output per layer."""
        found = {value.name for value in model.graph.outputs}
        if not {attentions_name(layer) for layer in range(self.spec.layers)} <= found:
            raise self.fail(f"not every one of {self.spec.layers} layers hands out its attention")


def _hand_out(graph: ir.Graph, value: ir.Value, name: str, shape: list[str | int]) -> None:
    """Make a value an output; through an Identity where it is one already, or an input."""
    if value.is_graph_output() or value.is_graph_input() or value.name == LAST_HIDDEN_STATE:
        copy = ir.node("Identity", [value])
        graph.append(copy)
        copy.outputs[0].type = value.type
        value = copy.outputs[0]
    value.name, value.shape = name, ir.Shape(shape)
    graph.outputs.append(value)
