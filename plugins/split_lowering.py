"""The third lowering of `nemotron::PartialRopeAttention`: SplitAttention and MergeAttention over a written cache.

It begins at the second, `plugins.standard.lower_to_standard_attention`: that is the graph that a bundle holds, since it
runs anywhere, and an engine with the kernels is built of it long after the fused op is gone. RotaryEmbedding and
TensorScatter write the cache as before, and only who reads it changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from plugins.nodes import Nodes
from plugins.onnxruntime import CannotLower
from plugins.ops import DOMAIN, DOMAIN_VERSION
from plugins.split_attention import MERGE_ATTENTION, SPLIT_ATTENTION
from plugins.standard import ATTENTION, replace

_KNOWN = {"is_causal": 1, "scale": None}  # attributes, and what they must be
_HEADS_FIRST = (0, 2, 1, 3)


@dataclass(frozen=True)
class Found:
    """An Attention with what is around it: the nodes that go, and what stays."""

    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]  # query, cos, sin, key_cache, value_cache
    lengths: ir.Value
    attributes: dict[str, Any]
    dtype: ir.DataType


def find_attentions(graph: ir.Graph, input_ids: ir.Value, write_indices: ir.Value) -> list[Found]:
    """Every Attention of a graph, in its order.

    Args:
        graph: with the standard form that `plugins.standard.lower_to_standard_attention` makes.
        input_ids: int64 [batch, sequence].
        write_indices: int64 [batch].

    Raises:
        CannotLower: an Attention of another form, with the node's name.
    """
    reader = _Reader(input_ids, write_indices)
    return [reader.read(node) for node in graph if node.op_type == ATTENTION and not node.domain]


def put_split_attention(graph: ir.Graph, found: list[Found], marks: Mapping[str, Any] | None = None) -> None:
    """Replace what was found by SplitAttention and MergeAttention, in place.

    Args:
        graph: the graph.
        found: what `find_attentions` found in it.
        marks: attributes more of either op, by which TensorRT finds its plugin.
    """
    build, lengths = Nodes(graph, "attention"), dict[ir.Value, ir.Value]()
    for each in found:
        if each.lengths not in lengths:
            lengths[each.lengths] = build("Cast", each.lengths, to=int(ir.DataType.INT32))
        given, marked = lengths[each.lengths], dict(marks or {})
        partials = build.many(SPLIT_ATTENTION, 3, *each.inputs, given, domain=DOMAIN, **each.attributes, **marked)
        context = build.many(MERGE_ATTENTION, 1, *partials, given, domain=DOMAIN, to=int(each.dtype), **marked)
        last = each.nodes[-1]
        replace(graph, last, build, context)
        graph.remove(reversed(each.nodes[:-1]), safe=True)
    if found:
        graph.opset_imports[DOMAIN] = DOMAIN_VERSION


class _Reader:
    """Reads one Attention after the other, and says of what is otherwise what it is."""

    def __init__(self, input_ids: ir.Value, write_indices: ir.Value) -> None:
        self._input_ids, self._write_indices = input_ids, write_indices
        self._node: ir.Node

    def read(self, node: ir.Node) -> Found:
        self._node = node
        for name, attribute in node.attributes.items():
            expected = _KNOWN.get(name, attribute)
            self._check(expected in (None, attribute.value), f"{name}={attribute.value!r}")
        self._check("is_causal" in node.attributes and "scale" in node.attributes, "no is_causal or no scale")
        given = [*node.inputs, *[None] * (7 - len(node.inputs))]
        query, key, value, *_, lengths = given
        self._check(lengths is not None and given[3:6] == [None] * 3, "a mask, a past or no lengths")
        rotated, turned, split = self._chain(query, "RotaryEmbedding", "Transpose", "Reshape")
        after = self._after(node, "Transpose")
        merged = self._after(after, "Reshape")
        for transpose in (turned, after):
            self._check(tuple(transpose.attributes["perm"].as_ints()) == _HEADS_FIRST, "heads in another place")
        self._check(not rotated.attributes.get_int("interleaved", 0), "an interleaved rotation")
        self._counts_from_the_cache(rotated.inputs[3], lengths)
        caches = [self._cache(each) for each in (key, value)]
        _, _, heads, width = self._constant(split.inputs[1])
        shape, dtype = caches[0].shape, caches[0].dtype
        self._check(shape is not None and dtype is not None, "a cache without shape or type")
        assert shape is not None
        assert dtype is not None
        assert lengths is not None
        attributes = {
            "heads": heads,
            "kv_heads": int(shape[1]),  # type: ignore[arg-type]  # a symbol is refused by int
            "head_dim": width,
            "rotary_dim": rotated.attributes.get_int("rotary_embedding_dim", 0) or width,
            "scale": node.attributes.get_float("scale"),
        }
        cos, sin = rotated.inputs[1:3]
        inputs = (split.inputs[0], cos, sin, key, value)
        assert all(each is not None for each in inputs)
        nodes = (split, turned, rotated, node, after, merged)
        return Found(nodes, inputs, lengths, attributes, dtype)  # type: ignore[arg-type]  # none is None

    def _cache(self, value: ir.Value | None) -> ir.Value:
        """The past of a cache that is updated here."""
        node = self._made_by(value, "TensorScatter")
        self._check(node.inputs[2] is self._write_indices, "a cache that is written elsewhere than at write_indices")
        past = node.inputs[0]
        assert past is not None
        return past

    def _counts_from_the_cache(self, positions: ir.Value | None, lengths: ir.Value | None) -> None:
        """Positions are those that SplitAttention derives from the lengths, `write_indices + sequence`."""
        start, steps = self._made_by(positions, "Add").inputs
        zero, limit, one = self._made_by(steps, "Range").inputs
        begin, sequence = self._made_by(lengths, "Add").inputs
        same = (
            begin is self._write_indices
            and self._made_by(start, "Unsqueeze").inputs[0] is self._write_indices
            and self._is_sequence(sequence)
            and self._is_sequence(self._made_by(limit, "Squeeze").inputs[0])
            and (self._constant(zero), self._constant(one)) == ([0], [1])
        )
        self._check(same, "positions or lengths that do not follow from write_indices")

    def _is_sequence(self, value: ir.Value | None) -> bool:
        shape = self._made_by(value, "Shape")
        window = shape.attributes.get_int("start", 0), shape.attributes.get_int("end", -1)
        return shape.inputs[0] is self._input_ids and window == (1, 2)

    def _chain(self, value: ir.Value | None, *kinds: str) -> list[ir.Node]:
        """The nodes that make a value, each from the one after it, and for nobody else."""
        nodes = []
        for kind in kinds:
            nodes.append(self._made_by(value, kind))
            self._check(len(nodes[-1].outputs[0].uses()) == 1, f"a {kind} that others read too")
            value = nodes[-1].inputs[0]
        return nodes

    def _after(self, node: ir.Node, kind: str) -> ir.Node:
        uses = list(node.outputs[0].uses())
        found = [use.node.op_type for use in uses]
        self._check(found == [kind], f"{', '.join(found) or 'nothing'} after {node.op_type}, not {kind}")
        return uses[0].node

    def _made_by(self, value: ir.Value | None, kind: str) -> ir.Node:
        node = None if value is None else value.producer()
        found = "an input of the graph" if node is None else node.op_type
        self._check(node is not None and node.op_type == kind, f"{found} where {kind} should be")
        assert node is not None
        return node

    def _constant(self, value: ir.Value | None) -> list[int]:
        self._check(value is not None and value.const_value is not None, "a shape that is computed")
        assert value is not None
        assert value.const_value is not None
        return [int(each) for each in value.const_value.numpy().reshape(-1)]

    def _check(self, holds: bool, found: str) -> None:
        if not holds:
            raise CannotLower(f"{self._node.name} has no form for {SPLIT_ATTENTION}: {found}")
