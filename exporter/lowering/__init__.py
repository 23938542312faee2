"""From the fused graph to a target: each fused op takes the target's form, and the graph its contract.

Fused graphs over a cache take `write_indices` [batch] and `logits_indices` [batch, kept]; target `onnxruntime` has the
contract of Hugging Face exports instead. Graphs of whole rows take `attention_mask` for either target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from exporter.lowering.mask_contract import adopt_mask, keep_last_tokens
from exporter.passes.base import has_cache
from plugins.onnxruntime import CONTRIB_DOMAIN, GROUP_QUERY_ATTENTION, CannotLower, quantize_cache
from plugins.ops import DOMAIN, is_fused
from plugins.standard import ATTENTION, lower_to_masked_attention, lower_to_standard_attention
from runtime.cache_scales import CacheScales
from runtime.contract import ATTENTION_MASK, INPUT_IDS, WRITE_INDICES
from runtime.errors import UserError


@dataclass(frozen=True)
class Form:
    """What a graph is lowered to.

    Attributes:
        attention: the operator that each layer's attention becomes.
        opsets: domains of the lowered graph and their versions.
        lower: turns a fused graph into this form, in place; tells what an operator could not do itself.
    """

    attention: str
    opsets: dict[str, int]
    lower: Callable[[ir.Graph], list[str]]


@dataclass(frozen=True)
class Target:
    """The forms of graphs with a cache and without, and the dtypes of a cache that is not as activations are."""

    cached: Form
    uncached: Form
    kv_caches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lowered:
    """What a graph has become: the operator of its attentions, its opset, and what that operator left to others."""

    attention: str
    opset: int
    fallbacks: tuple[str, ...]


def _to_standard_attention(graph: ir.Graph) -> list[str]:
    inputs = {value.name: value for value in graph.inputs}
    lower_to_standard_attention(graph, inputs[INPUT_IDS], inputs[WRITE_INDICES])
    return []


def _to_masked_attention(graph: ir.Graph) -> list[str]:
    lower_to_masked_attention(graph, next(value for value in graph.inputs if value.name == ATTENTION_MASK))
    return []


def _to_masked_attention_and_last_logits(graph: ir.Graph) -> list[str]:
    keep_last_tokens(graph)
    return _to_masked_attention(graph)


TARGETS = {
    "onnxruntime": Target(
        # The newest opset that every consumer of these graphs reads; no operator in them has changed its meaning since.
        cached=Form(GROUP_QUERY_ATTENTION, {"": 21, CONTRIB_DOMAIN: 1}, adopt_mask),
        uncached=Form(ATTENTION, {"": 23}, _to_masked_attention_and_last_logits),
        kv_caches=("int8",),
    ),
    "tensorrt": Target(
        cached=Form(ATTENTION, {"": 24}, _to_standard_attention),
        uncached=Form(ATTENTION, {"": 24}, _to_masked_attention),
    ),
}


def lower(model: ir.Model, name: str, layers: int, scales: CacheScales | None = None) -> Lowered:
    """Lower a fused graph in place; a graph already lowered stays as it is.

    Args:
        model: the fused graph.
        name: one of `TARGETS`.
        layers: attentions that it must have.
        scales: of an int8 cache; None for one of the activations' dtype.

    Raises:
        UserError: an unknown target, or a model that the target's operators cannot express.
    """
    if name not in TARGETS:
        raise UserError(f"unknown target {name!r}; known: {', '.join(TARGETS)}")
    form = TARGETS[name].cached if has_cache(model.graph) else TARGETS[name].uncached
    fallbacks: list[str] = []
    if any(map(is_fused, model.graph)):
        try:
            fallbacks = form.lower(model.graph)
        except CannotLower as error:
            raise UserError(
                f"target {name}: {error}; export this model with --no-cache, or with --target tensorrt"
            ) from error
    for identifier in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[identifier]
    model.opset_imports.pop(DOMAIN, None)
    model.opset_imports.update(form.opsets)
    lowered = sum(node.op_type == form.attention for node in model.graph)
    if lowered != layers:
        raise UserError(f"target {name}: {lowered} attentions for {layers} layers; nothing was exported")
    if scales is not None:
        quantize_cache(model.graph, list(zip(scales.keys, scales.values, strict=True)))
    return Lowered(form.attention, form.opsets[""], tuple(fallbacks))
