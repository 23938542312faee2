"""What one layer's attention looks like in the trace, as rewrite rules that end in one fused op."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter.pattern import ANY_VALUE, MatchingTracer, MatchResult, OrValue, RewriteRule, RewriteRuleSet

from exporter.passes.base import constant_of
from exporter.spec import NemotronSpec
from plugins.ops import DOMAIN

ROTARY = "PartialRotary"  # exists only between the rules
_END = np.iinfo(np.int64).max
_HEADS_FIRST = [0, 2, 1, 3]


def rotary_rules() -> RewriteRuleSet:
    """`x·cos + rotate_half(x)·sin`, on all channels of a head or on the first of them, becomes one node."""
    rules = [
        RewriteRule(_rotary, _to_rotary, _is_split_in_half, name="rotary", remove_nodes=False),
        RewriteRule(_partial_rotary, _to_rotary, name="partial_rotary", remove_nodes=False),
    ]
    return RewriteRuleSet(rules)


def attention_rules(spec: NemotronSpec, tables: list[ir.Value], write_indices: ir.Value) -> RewriteRuleSet:
    """Heads split, rotation, cache append, group expansion and attention of a layer become one fused op.

    Args:
        spec: heads and widths that the match must have.
        tables: cos and sin, float32 [max_length, rotary_dim/2].
        write_indices: int64 [batch], where each row's new tokens go.
    """

    def check(_context: Any, attention: ir.Value, **values: ir.Value) -> MatchResult:
        return _check_attention(spec, attention, values)

    def to_fused(
        op: Any, q: ir.Value, k: ir.Value, v: ir.Value, past_key: ir.Value, past_value: ir.Value, **_: Any
    ) -> Any:
        return op.PartialRopeAttention(
            *(q, k, v, *tables, past_key, past_value, write_indices),
            heads=spec.heads,
            kv_heads=spec.kv_heads,
            head_dim=spec.head_dim,
            rotary_dim=spec.rotary_dim,
            scale=spec.scale,
            _domain=DOMAIN,
            _outputs=3,
        )

    return RewriteRuleSet([RewriteRule(_attention, to_fused, check, name="attention", remove_nodes=False)])


def why_unmatched(rules: RewriteRuleSet, model: ir.Model) -> str:
    """The reason that the best partial match of any rule failed for."""
    tracer = MatchingTracer()
    rules.apply_to_model(model, tracer=tracer)
    reasons = [match.match_result.reason for matches in tracer.best_matches_map.values() for match in matches]
    return next(filter(None, reasons), "nothing like an attention is left to match")


def _rotary(op: Any, x: Any, cos: Any, sin: Any, half: Any) -> Any:
    first = op.Slice(x, [0], half, [3], [1])
    second = op.Slice(x, half, [_END], [3], [1])
    return x * cos + op.Concat(op.Neg(second), first, axis=-1) * sin


def _is_split_in_half(_context: Any, x: ir.Value, half: ir.Value, **_: Any) -> MatchResult:
    result = MatchResult()
    width = x.shape[-1] if x.shape is not None else None
    at = constant_of(half)
    if not isinstance(width, int) or at is None or at * 2 != width:
        return result.fail(f"the halves split {width} channels at {at}", x)
    return result


def _partial_rotary(op: Any, x: Any, cos: Any, sin: Any, width: Any) -> Any:
    rotated = op.PartialRotary(op.Slice(x, [0], width, [3], [1]), cos, sin, _domain=DOMAIN)
    return op.Concat(rotated, op.Slice(x, width, [_END], [3], [1]), axis=-1)


def _to_rotary(op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> Any:
    return op.PartialRotary(x, cos, sin, _domain=DOMAIN)


def _attention(op: Any, q: Any, k: Any, v: Any, past_key: Any, past_value: Any, cos: Any, sin: Any, mask: Any) -> Any:
    def heads_first(x: Any, name: str) -> Any:
        return op.Transpose(op.Reshape(x, ANY_VALUE), perm=_HEADS_FIRST, _outputs=[name])

    def expanded(x: Any, name: str) -> Any:
        grouped = op.Expand(op.Unsqueeze(x, [2]), ANY_VALUE)
        return OrValue([op.Reshape(grouped, ANY_VALUE), x], name=name)  # one key/value head per query head: as it is

    query = op.PartialRotary(heads_first(q, "query"), cos, sin, _domain=DOMAIN)
    key = op.PartialRotary(heads_first(k, "key"), cos, sin, _domain=DOMAIN)
    present_key = op.Concat(past_key, key, axis=-2)
    present_value = op.Concat(past_value, heads_first(v, "value"), axis=-2)
    keys, values = expanded(present_key, "keys"), expanded(present_value, "values")
    attention = op.Attention(query, keys, values, mask, _outputs=["attention"])
    context = op.Reshape(op.Transpose(op.Reshape(attention, ANY_VALUE), perm=_HEADS_FIRST), ANY_VALUE)
    return context, present_key, present_value


def _check_attention(spec: NemotronSpec, attention: ir.Value, values: dict[str, ir.Value]) -> MatchResult:
    result = MatchResult()
    shapes = {
        "query": (spec.heads, spec.head_dim),
        "key": (spec.kv_heads, spec.head_dim),
        "value": (spec.kv_heads, spec.head_dim),
        "keys": (spec.heads, spec.head_dim),
        "values": (spec.heads, spec.head_dim),
    }
    for name, expected in shapes.items():
        shape = values[name].shape
        if shape is None or (shape[1], shape[3]) != expected:
            return result.fail(f"{name} has shape {shape}, expected heads and head_dim {expected}", values[name])
    node = attention.producer()
    assert node is not None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    plain = {"is_causal": 0, "softcap": 0.0, "qk_matmul_output_mode": 0}
    if any(attributes.get(name, default) != default for name, default in plain.items()):
        return result.fail(f"attention is not plain: {attributes}", attention)
    if not np.isclose(attributes.get("scale", spec.scale), spec.scale):
        return result.fail(f"attention scale is {attributes['scale']}, expected {spec.scale}", attention)
    return result
