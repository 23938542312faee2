"""The points at which a decoder layer is looked at, in the order in which it computes them, and where a graph has them.

q after rotation is no value of a graph whose attention rotates inside. A copy of that attention, which is given the
queries as its keys, caches them as it rotates them: it is added to the graph, and run where it is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

import onnx_ir as ir

from plugins.onnxruntime import GROUP_QUERY_ATTENTION, ROTARY_EMBEDDING
from plugins.standard import ATTENTION
from runtime.contract import present_names

INPUT = "input"
NORM = "norm"
Q, K, V = "q", "k", "v"
Q_ROTATED, K_CACHED, V_CACHED = "q after rotary", "k after rotary", "v in the cache"
CONTEXT = "attention context"
ATTENDED = "attention output"
MIDDLE = "after attention"
MLP_NORM = "MLP norm"
UP, HIDDEN, DOWN = "MLP up", "MLP hidden", "MLP output"
OUTPUT = "output"
ORDER = (
    *(NORM, Q, K, V, Q_ROTATED, K_CACHED, V_CACHED, CONTEXT, ATTENDED, MIDDLE),
    *(MLP_NORM, UP, HIDDEN, DOWN, OUTPUT),
)  # fmt: skip

PROBE_PAST = "diagnose.past"  # an input: the empty cache of every probe, [batch, heads, capacity, head_dim]
_PRODUCTS = ("MatMul", "MatMulNBits", "FusedMatMul")
_RESHAPING = ("Transpose", "Reshape", "Cast", "GatherND")
_ROUNDING = ("Cast", "QuantizeLinear", "DequantizeLinear")
_CACHE_SCALES = ("k_quant_type", "v_quant_type", "kv_cache_bit_width")


def find_taps(graph: ir.Graph, streams: list[str]) -> list[dict[str, str]]:
    """The names of every layer's taps in a lowered graph, but for the cached keys and values; adds probes to it.

    What a graph does not have is left out.

    Args:
        graph: with a cache, of either target; what it computes stays as it is.
        streams: names of the residual stream, as it goes into each layer and comes out of the last.
    """
    found = []
    for layer, (before, after) in enumerate(pairwise(streams)):
        values = {**_of_attention(graph, layer), **_of_blocks(graph, layer, before, after)}
        found.append({tap: str(value.name) for tap, value in values.items() if value is not None})
    return found


def final_norm(graph: ir.Graph) -> str:
    """The name of what the final norm gives."""
    return str(_norm(graph, r"model\.norm\.weight(\..+)?").outputs[0].name)


def _of_attention(graph: ir.Graph, layer: int) -> dict[str, ir.Value | None]:
    """Projections, rotated queries and context."""
    key, value = (next(v for v in graph.outputs if v.name == name).producer() for name in present_names(layer))
    if key is None or value is None:
        return {}
    if key.op_type == GROUP_QUERY_ATTENTION:
        given = dict(zip((Q, K, V), key.inputs, strict=False))
        turning = [_made_by(given[tap], ROTARY_EMBEDDING) for tap in (Q, K)]
        if turning[0] is not None and turning[1] is not None:
            rotated = {Q_ROTATED: given[Q], Q: turning[0].inputs[0], K: turning[1].inputs[0]}
        else:
            rotated = {Q_ROTATED: _probe(graph, key)}
        return {**given, **rotated, CONTEXT: _behind_shape(key.outputs[0])}
    attention = next((node for node in key.outputs[0].consumers() if node.op_type == ATTENTION), None)
    if attention is None:
        return {}
    turned = [_made_by(source, ROTARY_EMBEDDING) for source in (attention.inputs[0], key.inputs[1])]
    return {
        **{tap: _ahead(node.inputs[0], _RESHAPING) for tap, node in zip((Q, K), turned, strict=True) if node},
        V: _ahead(value.inputs[1], _RESHAPING),
        Q_ROTATED: attention.inputs[0],
        CONTEXT: _behind_shape(attention.outputs[0]),
    }


def _of_blocks(graph: ir.Graph, layer: int, before: str, after: str) -> dict[str, ir.Value | None]:
    """Norms, what is added to the residual stream, and the MLP."""
    own = rf"model\.layers\.{layer}\."
    first, second = (
        _norm(graph, rf"{own}{name}_layernorm\.weight(\..+)?") for name in ("input", "post_attention")
    )  # fmt: skip
    middle = _ahead(second.inputs[0], ("Cast",))
    output = next(value for node in graph for value in node.outputs if value.name == after)
    down = _added(output, middle)
    return {
        NORM: first.outputs[0],
        ATTENDED: _added(middle, before),
        MIDDLE: middle,
        MLP_NORM: second.outputs[0],
        UP: _product_of(second.outputs[0]),
        HIDDEN: _read_by_product(down),
        DOWN: down,
    }


def _norm(graph: ir.Graph, pattern: str) -> ir.Node:
    norms = (node for node in graph if node.op_type == "LayerNormalization" and node.inputs[1] is not None)
    return next(node for node in norms if re.fullmatch(pattern, str(node.inputs[1] and node.inputs[1].name)))


def _added(total: ir.Value | None, residual: ir.Value | str | None) -> ir.Value | None:
    """What is added to the residual stream to make a value."""
    node = total.producer() if total is not None else None
    if node is None or node.op_type != "Add":
        return None
    name = residual if isinstance(residual, str) else residual and residual.name
    others = [value for value in node.inputs if (found := _ahead(value, _RESHAPING)) is None or found.name != name]
    return others[0] if len(others) == 1 else None


def _product_of(value: ir.Value) -> ir.Value | None:
    """The product that reads a value, with its bias."""
    readers = [node for node in value.consumers() if node.op_type in (*_PRODUCTS, *_ROUNDING)]
    if not readers:
        return None
    if readers[0].op_type in _ROUNDING:
        return _product_of(readers[0].outputs[0])
    product = readers[0].outputs[0]
    biased = [node for node in product.consumers() if node.op_type == "Add"]
    return biased[0].outputs[0] if biased and len(list(product.consumers())) == 1 else product


def _read_by_product(value: ir.Value | None) -> ir.Value | None:
    """What a product reads that makes a value, with its bias or without."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Add":
        node = next((made for v in node.inputs if v is not None and (made := v.producer()) is not None), None)
    return _ahead(node.inputs[0], _ROUNDING) if node is not None and node.op_type in _PRODUCTS else None


def _ahead(value: ir.Value | None, passed: Iterable[str]) -> ir.Value | None:
    """What a value was before these operators."""
    while value is not None and (node := value.producer()) is not None and node.op_type in passed:
        value = node.inputs[0]
    return value


def _behind_shape(value: ir.Value) -> ir.Value:
    """What becomes of a value by reshaping alone."""
    while len(readers := list(value.consumers())) == 1 and readers[0].op_type in _RESHAPING:
        value = readers[0].outputs[0]
    return value


def _made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def _probe(graph: ir.Graph, attention: ir.Node) -> ir.Value:
    """The cache of a copy of an attention whose keys are its queries, [batch, heads, total, head_dim]."""
    query, past = attention.inputs[0], attention.inputs[3]
    empty = next((value for value in graph.inputs if value.name == PROBE_PAST), None)
    if empty is None:
        dtype = next((value.type for value in (query, past) if value is not None and value.type is not None), None)
        empty = ir.Value(name=PROBE_PAST, type=dtype, shape=ir.Shape(["batch", "heads", "past", "width"]))
        graph.inputs.append(empty)
    attributes = [value for name, value in attention.attributes.items() if name not in _CACHE_SCALES]
    probe = ir.Node(
        attention.domain,
        attention.op_type,
        [query, query, query, empty, empty, *attention.inputs[5:9]],
        [value for value in attributes if value.name != "kv_num_heads"],
        num_outputs=3,
        name=f"{attention.name}.probe",
    )
    heads = attention.attributes.get_int("num_heads")
    assert heads is not None
    probe.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads)
    for value, part in zip(probe.outputs, ("context", "query", "values"), strict=True):
        value.name, value.type = f"{attention.name}.probe.{part}", empty.type
    graph.insert_after(attention, probe)
    graph.outputs.append(probe.outputs[1])  # what no output needs is left out of an evaluation
    return probe.outputs[1]
