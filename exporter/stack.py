"""All decoder layers from one: the layers of a Nemotron differ in nothing but their weights and cache."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from runtime.contract import past_names, present_names

_LAYER = "model.layers.{}."
_FINAL_NORM = "model.norm.weight"


def stack_layers(model: ir.Model, layers: int) -> None:
    """Repeat the one layer of a traced graph, in place, until there are `layers`.

    What depends on the layer's weights is the layer; what does not (positions, mask, cos and sin) is shared. Each
    copy reads the hidden state of the one below it, weights of its own name, and a cache of its own.

    Args:
        model: a graph traced from a model of one layer, its weights initializers called as in the checkpoint.
        layers: how many there shall be, at least 1.
    """
    graph = model.graph
    hidden_out = _final_norm(graph).inputs[0]
    assert hidden_out is not None
    template = _layer_nodes(graph, hidden_out)
    hidden_in = _hidden_input(template)
    rest = [(use.node, use.idx) for use in hidden_out.uses() if use.node not in set(template)]

    below, last = hidden_out, template[-1]
    for layer in range(1, layers):
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


def _final_norm(graph: ir.Graph) -> ir.Node:
    def reads(node: ir.Node) -> Iterable[str | None]:
        scale = node.inputs[1]
        producer = scale.producer() if scale is not None else None
        return [value.name for value in (producer.inputs if producer else [scale]) if value is not None]

    norms = (node for node in graph if node.op_type == "LayerNormalization")
    return next(node for node in norms if _FINAL_NORM in reads(node))


def _layer_nodes(graph: ir.Graph, hidden_out: ir.Value) -> list[ir.Node]:
    """The nodes that depend on the layer's weights and lead to its hidden state or its cache, in order."""
    ends = [hidden_out, *(value for value in graph.outputs if value.name in present_names(0))]
    leading, todo = set[ir.Node](), [end.producer() for end in ends]
    while todo:
        node = todo.pop()
        if node is not None and node not in leading:
            leading.add(node)
            todo.extend(value.producer() for value in node.inputs if value is not None)
    prefix, depending = _LAYER.format(0), set[ir.Value]()
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
    prefix, own = _LAYER.format(0), _LAYER.format(layer)
    caches = dict(zip(past_names(0), past_names(layer), strict=True))
    for value in (value for value in graph.inputs if value.name in caches):
        made[value] = ir.Value(name=caches[str(value.name)], shape=value.shape, type=value.type)
    graph.inputs.extend(made.values())
    for read in dict.fromkeys(read for node in template for read in node.inputs):
        if read is not None and read.name is not None and read.name.startswith(prefix):
            made[read] = ir.Value(name=own + read.name.removeprefix(prefix), shape=read.shape, type=read.type)
            graph.initializers.add(made[read])
    return made


def _copy(node: ir.Node, replaced: dict[ir.Value, ir.Value], layer: int) -> ir.Node:
    """A node's copy that reads what stands for its inputs; its outputs are noted for the nodes after it."""
    copy = ir.Node(
        node.domain,
        node.op_type,
        [replaced.get(value, value) if value is not None else None for value in node.inputs],
        list(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=f"{node.name}.layer_{layer}",
    )
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.name, new.shape, new.type = f"{old.name}.layer_{layer}", old.shape, old.type
        replaced[old] = new
    return copy
