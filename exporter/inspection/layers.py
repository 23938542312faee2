"""Which decoder layer each node of a graph belongs to, and what a layer is made of."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from exporter.inspection.graph import GraphFacts, Node
from exporter.inspection.tensors import LOOKUPS, format_of
from exporter.parameters import BASE, EMBEDDING, LAYERS
from runtime.contract import INPUTS_EMBEDS

_LAYER = re.compile(rf"(?:{re.escape(LAYERS)}|cache\.)(\d+)\.")  # names of weights, and of a rounded cache's scales
_BEFORE = -1  # the embedding


@dataclass(frozen=True)
class Run:
    """Neighbouring layers `first` … `last` that are made alike.

    Attributes:
        ops: how often each operator occurs in one of them.
        fused: what its fused operators do, in words.
    """

    first: int
    last: int
    ops: dict[str, int]
    fused: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """An object of `layers` of the command `inspect`."""
        return {"first": self.first, "last": self.last, "ops": self.ops, "fused": list(self.fused)}


def nodes_by_layer(graph: GraphFacts) -> list[list[Node]]:
    """The nodes of each decoder layer, in the graph's order.

    A layer begins with what reads its weights or its cache. What follows from it is its own up to the sum that joins
    two of its values, the residual; what only passes a layer's value on (a cast, a choice of tokens) belongs to the
    one that reads it.
    """
    depth = 1 + max((int(found[1]) for name in graph.initializers if (found := _LAYER.match(name))), default=_BEFORE)
    own = {node.outputs[0]: _own_layer(node, depth) for node in graph.nodes}
    upstream = _latest_layer(graph, own)
    consumers = graph.consumers()
    place: dict[str, int | None] = {}
    for node in reversed(graph.nodes):
        key = node.outputs[0]
        level, anchor = upstream[key], own[key]
        if level is None or anchor is not None:
            place[key] = anchor
            continue
        readers = {place[reader.outputs[0]] for name in node.outputs for reader in consumers.get(name, ())}
        ends = sum(upstream.get(name) == level for name in dict.fromkeys(node.inputs)) > 1
        if level in readers or ends:
            place[key] = level
        else:
            place[key] = readers.pop() if len(readers) == 1 else depth
    layers: list[list[Node]] = [[] for _ in range(depth)]
    for node in graph.nodes:
        layer = place[node.outputs[0]]
        if layer is not None and _BEFORE < layer < depth:
            layers[layer].append(node)
    return layers


def layer_runs(graph: GraphFacts, layers: list[list[Node]]) -> list[Run]:
    """The stack of decoder layers, neighbours that are made alike taken together."""
    runs: list[Run] = []
    last: object = None
    for index, nodes in enumerate(layers):
        ops, fused = dict(Counter(node.qualified for node in nodes)), _fused(graph, nodes)
        if (ops, fused) == last:
            runs[-1] = Run(runs[-1].first, index, ops, fused)
        else:
            runs.append(Run(index, index, ops, fused))
        last = ops, fused
    return runs


def _own_layer(node: Node, depth: int) -> int | None:
    """The layer whose weights a node reads, _BEFORE for the embedding, `depth` for the final norm; else None."""
    for name in node.inputs:
        if found := _LAYER.match(name):
            return int(found[1])
        if name.startswith(f"{BASE}norm."):
            return depth
        if name.startswith(EMBEDDING) and node.op_type in LOOKUPS:
            return _BEFORE
    return None


def _latest_layer(graph: GraphFacts, own: dict[str, int | None]) -> dict[str, int | None]:
    """Of each value the last layer that it depends on, _BEFORE for the embedding alone; None for no weight."""
    found: dict[str, int | None] = {name: _BEFORE if name == INPUTS_EMBEDS else None for name in graph.inputs}
    for node in graph.nodes:
        known = [layer for name in node.inputs if (layer := found.get(name)) is not None]
        if (layer := own[node.outputs[0]]) is not None:
            known.append(layer)
        for name in node.outputs:
            found[name] = max(known, default=None)
    return found


def _fused(graph: GraphFacts, nodes: list[Node]) -> tuple[str, ...]:
    """What a layer's operators stand for, beyond single ones of ONNX, each with how often."""
    squared = {node.inputs[0] for node in nodes if node.op_type == "Mul" and node.inputs[0] == node.inputs[1]}
    told: Counter[str] = Counter()
    for node in nodes:
        match node.op_type:
            case "GroupQueryAttention" | "Attention":
                told[_attention(node, graph)] += 1
            case "RotaryEmbedding":
                told[f"{node.qualified} ({_rotated(node, graph)})"] += 1
            case "TensorScatter":
                told["TensorScatter (cache update)"] += 1
            case "LayerNormalization":
                folded = " (LayerNorm1P, 1 added to its weight)" if node.inputs[1].endswith(".plus_one") else ""
                told[f"LayerNormalization{folded}"] += 1
            case "Relu" if node.outputs[0] in squared:
                told["Relu, Mul (relu²)"] += 1
            case "MatMulNBits" | "DequantizeLinear":
                weight = next(name for name in node.inputs if name in graph.initializers)
                told[f"{node.op_type} ({format_of(graph, node, weight).words})"] += 1
            case "GatherND":
                told["GatherND (tokens whose logits are asked for)"] += 1
    return tuple(what + (f" ×{count}" if count > 1 else "") for what, count in told.items())


def _attention(node: Node, graph: GraphFacts) -> str:
    if node.op_type == "Attention":
        return f"Attention ({'causal' if node.attributes.get('is_causal') else 'with a mask'})"
    heads, kv_heads = node.attributes["num_heads"], node.attributes["kv_num_heads"]
    rotary = f"rotary of {_rotated(node, graph)}, " if node.attributes.get("do_rotary") else ""
    cache = "int8 cache" if node.attributes.get("kv_cache_bit_width") == 8 else "cache"
    return f"GroupQueryAttention ({heads} heads on {kv_heads}, {rotary}{cache} update inside)"


def _rotated(node: Node, graph: GraphFacts) -> str:
    """How many channels of a head rotate, by the tables [positions, rotary_dim / 2]."""
    widths = {graph.initializers[name].shape[-1] for name in node.inputs if name.startswith("rope.")}
    return f"{2 * widths.pop()} channels" if len(widths) == 1 else "tables that are computed"
