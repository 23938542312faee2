from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from exporter.origin import origin_of
from exporter.passes.base import PassFailed
from exporter.passes.fold_layernorm1p import FoldLayerNorm1P


def test_a_norm_that_adds_another_number_is_not_taken_for_layernorm1p(traced: Any) -> None:
    _, model = traced()
    add = next(n for n in model.graph if n.op_type == "LayerNormalization").inputs[1].producer()
    add.replace_input_with(1, ir.val("two", const_value=ir.tensor(2.0, name="two")))
    with pytest.raises(PassFailed, match="adds something other than one"):
        FoldLayerNorm1P()(model)


def test_a_norm_that_is_missing_stops_the_export(traced: Any) -> None:
    _, model = traced()
    next(n for n in model.graph if n.op_type == "LayerNormalization").op_type = "RMSNormalization"
    with pytest.raises(PassFailed, match=r"fold_layernorm1p: folded 2 norms where 1 layers have 3"):
        FoldLayerNorm1P()(model)


def test_a_norm_without_the_one_stops_the_export(traced: Any) -> None:
    _, model = traced()
    norm = next(n for n in model.graph if n.op_type == "LayerNormalization")
    norm.replace_input_with(1, norm.inputs[1].producer().inputs[0])
    with pytest.raises(PassFailed, match=r"folded 2 norms where 1 layers have 3"):
        FoldLayerNorm1P()(model)


def test_the_one_is_remembered_for_the_weight_it_belongs_to(traced: Any) -> None:
    _, model = traced()
    assert FoldLayerNorm1P()(model).count == 3
    scales = [node.inputs[1] for node in model.graph if node.op_type == "LayerNormalization"]
    assert [origin_of(scale).plus_one for scale in scales] == [True] * 3
    assert origin_of(scales[-1]).tensor == "model.norm.weight"
