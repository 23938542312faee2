"""Rotary, cache and grouped attention of each layer become one fused op; so do they in graphs without a cache.

The traced graph slices, rotates and concatenates queries and keys, appends to a growing cache, expands each
key/value head to its group, and masks by a subgraph of a dozen nodes. Each layer's part is matched as a pattern; the
parts shared by all layers (the mask, cos and sin) are evaluated on a small case and must equal what the fused op does.
Afterwards a cache has a fixed capacity, and `write_indices` says where each row's new tokens go.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.passes.attention_patterns import ROTARY, Shared, attention_rules, rotary_rules, why_unmatched
from exporter.passes.base import LayerPass, has_cache, layers_of
from exporter.passes.subgraph import evaluate
from exporter.spec import NemotronSpec
from plugins.nodes import Nodes
from plugins.ops import (
    DOMAIN,
    DOMAIN_VERSION,
    is_fused,
    partial_rope_attention_function,
    partial_rope_self_attention_function,
)
from runtime.contract import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, WRITE_INDICES, past_names, present_names


class FusePartialRopeAttention(LayerPass):
    """One fused op per layer, or the export stops."""

    name: ClassVar[str] = "fuse_partial_rope_attention"

    def __init__(
        self,
        spec: NemotronSpec,
        cos: NDArray[np.float32],
        sin: NDArray[np.float32],
        *,
        position_ids: bool = False,
    ) -> None:
        self.spec, self.cos, self.sin, self.position_ids = spec, cos, sin, position_ids

    def apply(self, model: ir.Model) -> int:
        """Fuse every layer's attention, then give the graph the fused op's contract."""
        if any(map(is_fused, model.graph)):
            return 0
        cached = has_cache(model.graph)
        rotary = rotary_rules()
        while rotary.apply_to_model(model):  # one rule matches what another made
            pass
        self._check_shared(model, cached)
        rules = attention_rules(self.spec, self._shared(model.graph, cached))
        fused = rules.apply_to_model(model)
        if fused != (layers := layers_of(model.graph)):
            raise self.fail(f"fused {fused} of {layers} layers' attentions: {why_unmatched(rules, model)}")
        if cached:
            self._adopt_cache(model.graph)
        inputs = {value.name: value for value in model.graph.inputs}
        for name in (INPUT_IDS, *(() if cached else (ATTENTION_MASK,))):
            inputs[name].shape = ir.Shape(["batch", "sequence"])
        given = self.position_ids
        function = (
            partial_rope_attention_function(position_ids=given) if cached else partial_rope_self_attention_function()
        )
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
        return fused

    def made(self, model: ir.Model) -> int:
        """Fused ops."""
        return sum(map(is_fused, model.graph))

    def ensures(self, model: ir.Model) -> None:
        """As many fused ops as layers, and nothing left of what they replace."""
        fused, layers = self.made(model), layers_of(model.graph)
        if fused != layers:
            raise self.fail(f"fused {fused} attentions of {layers} layers")
        left = sorted({node.op_type for node in model.graph} & {"Attention", "Softmax", ROTARY})
        if left:
            raise self.fail(f"{', '.join(left)} remain beside the fused attentions")

    def _shared(self, graph: ir.Graph, cached: bool) -> Shared:
        """The fused ops' common inputs, made where the trace has none of them."""
        tables = self._table(graph, "rope.cos", self.cos), self._table(graph, "rope.sin", self.sin)
        positions = None
        if self.position_ids:
            positions = ir.val(POSITION_IDS, dtype=ir.DataType.INT64, shape=["batch", "sequence"])
            graph.inputs.insert(2, positions)
        if cached:
            write_indices = ir.val(WRITE_INDICES, dtype=ir.DataType.INT64, shape=["batch"])
            graph.inputs.insert(1, write_indices)
            return Shared(tables, write_indices=write_indices, position_ids=positions)
        mask = next(value for value in graph.inputs if value.name == ATTENTION_MASK)
        return Shared(tables, position_ids=positions or self._columns(graph, mask), attention_mask=mask)

    @staticmethod
    def _columns(graph: ir.Graph, mask: ir.Value) -> ir.Value:
        """Each token's column, int64 [batch, sequence]: the positions that transformers takes where none are given."""
        nodes = Nodes(graph, "positions")
        shape = nodes("Shape", mask)
        sequence = nodes("Squeeze", nodes("Shape", mask, start=1, end=2))
        columns = nodes("Range", nodes.constant("zero", 0), sequence, nodes.constant("one", 1))
        positions = nodes("Expand", nodes("Unsqueeze", columns, nodes.constant("axis", [0])), shape)
        graph.insert_before(next(iter(graph)), nodes.take())
        return positions

    @staticmethod
    def _table(graph: ir.Graph, name: str, table: NDArray[np.float32]) -> ir.Value:
        value = ir.val(name, const_value=ir.tensor(table, name=name))
        graph.initializers.add(value)
        return value

    def _check_shared(self, model: ir.Model, cached: bool) -> None:
        """Evaluate mask, cos and sin for two rows of three new tokens, after two cached ones; one row has padding."""
        attentions = [node for node in model.graph if node.op_type == "Attention"]
        rotaries = [node for node in model.graph if node.op_type == ROTARY]
        shared = {node.inputs[3] for node in attentions} | {v for node in rotaries for v in node.inputs[1:]}
        masks = {node.inputs[3] for node in attentions}
        cosines, sines = ({node.inputs[i] for node in rotaries} for i in (1, 2))
        if None in shared or not (len(masks) == len(cosines) == len(sines) == 1):
            raise self.fail(
                f"{len(attentions)} attentions and {len(rotaries)} rotations do not share one mask, cos and sin"
            )
        past = min(2, len(self.cos) - 1) if cached else 0
        sequence = min(3, len(self.cos) - past)
        keep = np.ones((2, past + sequence), np.int64)
        keep[1, -1 if cached else 0] = 0
        cache = np.zeros((2, self.spec.kv_heads, past, self.spec.head_dim), np.float32)
        feeds: dict[str, NDArray[np.generic]] = {
            ATTENTION_MASK: keep,
            INPUT_IDS: np.zeros((2, sequence), np.int64),
        }
        feeds |= {name: cache for layer in range(layers_of(model.graph)) for name in past_names(layer)}
        values = [value for group in (masks, cosines, sines) for value in group if value is not None]
        mask, cos, sin = evaluate(model, values, feeds)

        causal = np.arange(past + sequence) <= past + np.arange(sequence)[:, None]
        expected = causal[None, None] & (keep[:, None, None] > 0)
        if mask.dtype != np.bool_ or not np.array_equal(np.broadcast_to(mask, expected.shape), expected):
            raise self.fail("the attention mask is not causality and padding alone")
        for name, found, table in (("cos", cos, self.cos), ("sin", sin, self.sin)):
            rows = np.tile(table[past : past + sequence], 2)
            if not np.allclose(np.broadcast_to(found, (1, 1, *rows.shape)), rows, atol=1e-6):
                raise self.fail(f"the {name} of the rotary embedding is not the table's")

    def _adopt_cache(self, graph: ir.Graph) -> None:
        for unused in [value for value in graph.inputs if value.name == ATTENTION_MASK and not value.uses()]:
            graph.inputs.remove(unused)
        if any(value.name == ATTENTION_MASK for value in graph.inputs):
            raise self.fail("the attention mask is used outside the attentions")
        cache = ir.Shape(["batch", self.spec.kv_heads, "capacity", self.spec.head_dim])
        names = [n for layer in range(layers_of(graph)) for n in (*past_names(layer), *present_names(layer))]
        values = {value.name: value for value in (*graph.inputs, *graph.outputs)}
        for name in names:
            values[name].shape = cache.copy()
            values[name].dtype = ir.DataType.FLOAT
