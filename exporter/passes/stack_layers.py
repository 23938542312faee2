"""All decoder layers from one: the layers of a Nemotron differ in nothing but their weights and cache.

Passes ahead of this one work on the graph of one layer, so that what they cost does not depend on the depth.
"""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from exporter.origin import origin_of, twin
from exporter.parameters import FINAL_NORM, layer_prefix
from exporter.passes.base import GraphPass, layers_of
from exporter.spec import NemotronSpec
from runtime.contract import past_names, present_names


class StackLayers(GraphPass):
    """Repeats the one layer of a graph until there are as many as the model has.

    What depends on the layer's weights is the layer; what does not (positions, mask, rotary tables) is shared. Each
    copy reads the hidden state of the one below it, weights of its own name, and a cache of its own.
    """

    name: ClassVar[str] = "stack_layers"

    def __init__(self, spec: NemotronSpec) -> None:
        self.layers = spec.layers

    def apply(self, model: ir.Model) -> int:
        """Repeat the layer, unless all of them are there; the count is of layers added."""
        graph = model.graph
        if layers_of(graph) == self.layers:
            return 0
        if layers_of(graph) != 1:
            raise self.fail(f"the graph has {layers_of(graph)} layers, to be stacked it should have one")
        hidden_out = self._final_norm(graph).inputs[0]
        assert hidden_out is not None
        template = _layer_nodes(graph, hidden_out)
        hidden_in = _hidden_input(template)
        rest = [(use.node, use.idx) for use in hidden_out.uses() if use.node not in set(template)]

        below, last = hidden_out, template[-1]
        for layer in range(1, self.layers):
            replaced = {hidden_in: below, **_inputs_of(graph, template, layer)}
            copies = [_copy(node, replaced, layer) for node in template]
            graph.insert_after(last, copies)
            for name, base in zip(present_names(layer), present_names(0), strict=True):
                for output in [replaced[value] for value in graph.outputs if value.name == base]:
                    output.name = name
                    graph.outputs.append(output)
            below, last = replaced[hidden_out], copies[-1]
        for node, index in rest:
            node.replace_input_with(index, below)
        return self.layers - 1

    def ensures(self, model: ir.Model) -> None:
        """Every layer of the model is there."""
        if (found := layers_of(model.graph)) != self.layers:
            raise self.fail(f"the graph has {found} layers where the model has {self.layers}")

    def _final_norm(self, graph: ir.Graph) -> ir.Node:
        for node in graph:
            scale = node.inputs[1] if node.op_type == "LayerNormalization" else None
            if scale is not None and origin_of(scale).tensor == FINAL_NORM:
                return node
        raise self.fail(f"no norm reads {FINAL_NORM}")


def _layer_nodes(graph: ir.Graph, hidden_out: ir.Value) -> list[ir.Node]:
    """The nodes that depend on the layer's weights and lead to its hidden state or its cache, in order."""
    ends = [hidden_out, *(value for value in graph.outputs if value.name in present_names(0))]
    leading, todo = set[ir.Node](), [end.producer() for end in ends]
    while todo:
        node = todo.pop()
        if node is not None and node not in leading:
            leading.add(node)
            todo.extend(value.producer() for value in node.inputs if value is not None)
    prefix, depending = layer_prefix(0), set[ir.Value]()
    nodes = []
    for node in graph:
        if any(v is not None and (v in depending or (v.name or "").startswith(prefix)) for v in node.inputs):
            depending.update(node.outputs)
            if node in leading:
                nodes.append(node)
    return nodes


def _hidden_input(template: list[ir.Node]) -> ir.Value:
    norm = next(node for node in template if node.op_type == "LayerNormalization")
    assert norm.inputs[0] is not None
    return norm.inputs[0]


def _inputs_of(graph: ir.Graph, template: list[ir.Node], layer: int) -> dict[ir.Value, ir.Value]:
    """The weights and cache inputs of layer 0 that its nodes read, and those of another layer, made here."""
    made: dict[ir.Value, ir.Value] = {}
    prefix, own = layer_prefix(0), layer_prefix(layer)
    caches = dict(zip(past_names(0), past_names(layer), strict=True))
    for value in (value for value in graph.inputs if value.name in caches):
        made[value] = _like(value, caches[str(value.name)])
    graph.inputs.extend(made.values())
    for read in dict.fromkeys(read for node in template for read in node.inputs):
        if read is not None and read.name is not None and read.name.startswith(prefix):
            made[read] = twin(read, prefix, own)
            graph.initializers.add(made[read])
    return made


def _copy(node: ir.Node, replaced: dict[ir.Value, ir.Value], layer: int) -> ir.Node:
    """A node's copy that reads what stands for its inputs; its outputs are noted for the nodes after it."""
    outputs = [_like(old, f"{old.name}.layer_{layer}") for old in node.outputs]
    replaced.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain,
        node.op_type,
        [replaced.get(value, value) if value is not None else None for value in node.inputs],
        list(node.attributes.values()),
        outputs=outputs,
        name=f"{node.name}.layer_{layer}",
    )


def _like(value: ir.Value, name: str) -> ir.Value:
    """A value of a name of its own, and a shape of its own, which a pass may change."""
    return ir.Value(name=name, shape=value.shape.copy() if value.shape is not None else None, type=value.type)
