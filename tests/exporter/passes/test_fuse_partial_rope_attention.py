"""Fusion must refuse whatever is nearly, but not quite, what the fused op does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import SMALL

from exporter.passes.base import PassFailed
from exporter.passes.clean_up import CleanUp
from exporter.passes.fuse_partial_rope_attention import FusePartialRopeAttention
from exporter.rope import rope_tables
from exporter.spec import NemotronSpec, spec_from_config
from exporter.trace import trace_whole


@pytest.fixture(scope="module")
def whole() -> tuple[NemotronSpec, ir.Model]:
    """Two layers, each of them traced: what is done to one must not pass for the other."""
    spec = spec_from_config({"model_type": "nemotron", **SMALL}, "test")
    model = trace_whole(spec)
    CleanUp()(model)
    return spec, model


def fuse(whole: tuple[NemotronSpec, ir.Model], change: Callable[[ir.Model], None]) -> None:
    spec, model = whole[0], whole[1].clone()
    change(model)
    FusePartialRopeAttention(spec, *rope_tables(spec, spec.max_positions))(model)


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


def unary(model: ir.Model, op_type: str, value: ir.Value, before: ir.Node) -> ir.Value:
    node = ir.node(op_type, [value])
    node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
    model.graph.insert_before(before, node)
    return node.outputs[0]


def test_the_trace_as_it_is_fuses(whole: Any) -> None:
    fuse(whole, lambda model: None)


def test_a_mask_that_is_not_causal_is_not_fused_away(whole: Any) -> None:
    def look_ahead(model: ir.Model) -> None:
        order = next(node for node in model.graph if node.op_type == "LessOrEqual")
        order.replace_input_with(0, order.inputs[1])

    with pytest.raises(PassFailed, match="not causality and padding alone"):
        fuse(whole, look_ahead)


def test_a_mask_of_one_layer_alone_stops_the_export(whole: Any) -> None:
    def another_mask(model: ir.Model) -> None:
        last = attentions(model)[-1]
        last.replace_input_with(3, unary(model, "Not", last.inputs[3], last))

    with pytest.raises(PassFailed, match="do not share one mask"):
        fuse(whole, another_mask)


def test_other_frequencies_than_the_tables_are_not_fused_away(whole: Any) -> None:
    def slower(model: ir.Model) -> None:
        value = next(v for name, v in model.graph.initializers.items() if name.endswith("inv_freq"))
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(0.5), name=value.name)

    with pytest.raises(PassFailed, match="cos of the rotary embedding is not the table's"):
        fuse(whole, slower)


def test_a_layer_with_another_scale_names_the_scale(whole: Any) -> None:
    def sharper(model: ir.Model) -> None:
        attentions(model)[0].attributes["scale"] = ir.AttrFloat32("scale", 1.0)

    with pytest.raises(PassFailed, match=r"fused 1 of 2 layers' attentions: attention scale is 1.0, expected 0.176"):
        fuse(whole, sharper)


def test_a_layer_with_soft_capping_is_not_fused(whole: Any) -> None:
    def capped(model: ir.Model) -> None:
        attentions(model)[1].attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)

    with pytest.raises(PassFailed, match="fused 1 of 2 layers' attentions: attention is not plain"):
        fuse(whole, capped)


def test_a_query_without_rotation_is_not_fused(whole: Any) -> None:
    def unrotated(model: ir.Model) -> None:
        attention = attentions(model)[0]
        key_like = attention.inputs[0].producer().inputs[1].producer().inputs[0]  # the query before its slice
        attention.replace_input_with(0, unary(model, "Identity", key_like, attention))

    with pytest.raises(PassFailed, match="fused 1 of 2"):
        fuse(whole, unrotated)


def test_an_interleaved_rotation_is_not_fused(whole: Any) -> None:
    def swapped(model: ir.Model) -> None:
        negation = next(node for node in model.graph if node.op_type == "Neg")
        concat = next(iter(negation.outputs[0].uses())).node
        first, second = concat.inputs
        concat.replace_input_with(0, second)
        concat.replace_input_with(1, first)

    with pytest.raises(PassFailed):
        fuse(whole, swapped)
