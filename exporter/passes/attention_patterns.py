"""What one layer's attention looks like in the trace, as rewrite rules that end in one fused op."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Shared:
    """What the fused ops of all layers read.

    Attributes:
        tables: cos and sin, float32 [max_length, rotary_dim/2].
        write_indices: int64 [batch], where each row's new tokens go; None without a cache.
        position_ids: int64 [batch, sequence]; None where they follow from `write_indices`.
        attention_mask: int64 [batch, sequence]; None with a cache.
    """

    tables: tuple[ir.Value, ir.Value]
    write_indices: ir.Value | None = None
    position_ids: ir.Value | None = None
    attention_mask: ir.Value | None = None


def attention_rules(spec: NemotronSpec, shared: Shared) -> RewriteRuleSet:
    """Heads split, rotation, cache append, group expansion and attention of a layer become one fused op.

    Args:
        spec: heads and widths that the match must have.
        shared: the fused op's inputs that are not of a layer.
    """
    attributes = {
        "heads": spec.heads,
        "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "rotary_dim": spec.rotary_dim,
        "scale": spec.scale,
        "_domain": DOMAIN,
    }

    def check(_context: Any, attention: ir.Value, **values: ir.Value) -> MatchResult:
        return _check_attention(spec, attention, values)

    def to_cached(
        op: Any, q: ir.Value, k: ir.Value, v: ir.Value, past_key: ir.Value, past_value: ir.Value, **_: Any
    ) -> Any:
        given = () if shared.position_ids is None else (shared.position_ids,)
        inputs = (q, k, v, *shared.tables, past_key, past_value, shared.write_indices, *given)
        return op.PartialRopeAttention(*inputs, **attributes, _outputs=3)

    def to_whole(op: Any, q: ir.Value, k: ir.Value, v: ir.Value, **_: Any) -> Any:
        inputs = (q, k, v, *shared.tables, shared.position_ids, shared.attention_mask)
        return op.PartialRopeSelfAttention(*inputs, **attributes, _outputs=2)[0]

    pattern, replacement = (_attention, to_whole) if shared.write_indices is None else (_cached_attention, to_cached)
    return RewriteRuleSet([RewriteRule(pattern, replacement, check, name="attention", remove_nodes=False)])


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


def _heads_first(op: Any, x: Any, name: str) -> Any:
    return op.Transpose(op.Reshape(x, ANY_VALUE), perm=_HEADS_FIRST, _outputs=[name])


def _expanded(op: Any, x: Any, name: str) -> Any:
    grouped = op.Expand(op.Unsqueeze(x, [2]), ANY_VALUE)
    return OrValue([op.Reshape(grouped, ANY_VALUE), x], name=name)  # one key/value head per query head: as it is


def _attended(op: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    attention = op.Attention(
        query, _expanded(op, key, "keys"), _expanded(op, value, "values"), mask, _outputs=["attention"]
    )
    return op.Reshape(op.Transpose(op.Reshape(attention, ANY_VALUE), perm=_HEADS_FIRST), ANY_VALUE)


def _attention(op: Any, q: Any, k: Any, v: Any, cos: Any, sin: Any, mask: Any) -> Any:
    query = op.PartialRotary(_heads_first(op, q, "query"), cos, sin, _domain=DOMAIN)
    key = op.PartialRotary(_heads_first(op, k, "key"), cos, sin, _domain=DOMAIN)
    return _attended(op, query, key, _heads_first(op, v, "value"), mask)


def _cached_attention(
    op: Any, q: Any, k: Any, v: Any, past_key: Any, past_value: Any, cos: Any, sin: Any, mask: Any
) -> Any:
    query = op.PartialRotary(_heads_first(op, q, "query"), cos, sin, _domain=DOMAIN)
    key = op.PartialRotary(_heads_first(op, k, "key"), cos, sin, _domain=DOMAIN)
    present_key = op.Concat(past_key, key, axis=-2)
    present_value = op.Concat(past_value, _heads_first(op, v, "value"), axis=-2)
    return _attended(op, query, present_key, present_value, mask), present_key, present_value


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
