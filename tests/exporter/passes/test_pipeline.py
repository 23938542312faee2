"""The passes together: every structure a Nemotron can have fuses completely, and a second run changes nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir
import pytest

from exporter.origin import is_weight, origin_of
from exporter.passes import pipeline, run
from exporter.rope import rope_tables
from exporter.tasks import TASKS
from plugins.ops import is_partial_rope_attention

TEXT = TASKS["text-generation"]

STRUCTURES = {
    "grouped": {},
    "one kv head per head, all channels rotate": {"num_key_value_heads": 4, "partial_rotary_factor": 1.0},
    "one kv head, biases, one layer": {
        "num_key_value_heads": 1,
        "attention_bias": True,
        "mlp_bias": True,
        "num_hidden_layers": 1,
    },
    "scaled tables, another activation, tied": {
        "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
        "hidden_act": "gelu",
        "tie_word_embeddings": True,
    },
}


CASES = [
    pytest.param(
        config, id=name, marks=[] if name in ("grouped", "one kv head, biases, one layer") else [pytest.mark.slow]
    )
    for name, config in STRUCTURES.items()
]


def optimized(traced: Any, **config: Any) -> tuple[Any, ir.Model, dict[str, int]]:
    spec, model = traced(**config)
    passes = pipeline(spec, *rope_tables(spec, spec.max_positions))
    counts = {report.name: report.count for report in reversed(run(passes, model))}
    return spec, model, counts


@pytest.mark.parametrize("config", CASES)
def test_every_layer_becomes_one_fused_attention_and_nothing_is_left_over(traced: Any, config: dict[str, Any]) -> None:
    spec, model, counts = optimized(traced, **config)
    assert counts["fuse_partial_rope_attention"] == spec.layers == sum(map(is_partial_rope_attention, model.graph))
    assert counts["fold_layernorm1p"] == 2 * spec.layers + 1
    assert counts["square_relu"] == (spec.layers if spec.activation == "relu2" else 0)
    left = Counter(node.op_type for node in model.graph)
    assert not left.keys() & {"Attention", "Slice", "Neg", "Concat", "Expand", "Reshape", "Transpose", "Cos", "Pow"}
    assert left["MatMul"] == 6 * spec.layers + 1


def test_a_second_run_changes_nothing(traced: Any) -> None:
    spec, model, _ = optimized(traced)
    before = [(node.op_type, [v.name if v else None for v in node.inputs]) for node in model.graph]
    again = run(pipeline(spec, *rope_tables(spec, spec.max_positions)), model)
    assert [report.count for report in again] == [0] * len(again)
    assert [(node.op_type, [v.name if v else None for v in node.inputs]) for node in model.graph] == before


def test_the_graph_names_every_weight_of_the_checkpoint_once(traced: Any) -> None:
    from exporter.parameters import expected_shapes

    spec, model, _ = optimized(traced)
    origins = [origin_of(value) for value in model.graph.initializers.values() if is_weight(value)]
    assert sorted(origin.tensor for origin in origins) == sorted(expected_shapes(spec, TEXT))
    assert {r.tensor for r in origins if r.plus_one} == {
        n for n in expected_shapes(spec, TEXT) if n.endswith("norm.weight")
    }


def test_the_fused_graph_has_the_contract_that_targets_are_lowered_from(traced: Any) -> None:
    _, model, _ = optimized(traced)
    shapes = {value.name: [str(d) for d in value.shape] for value in (*model.graph.inputs, *model.graph.outputs)}
    cache = ["batch", "2", "capacity", "32"]
    caches = {
        f"{kind}.{layer}.{half}": cache
        for kind in ("past_key_values", "present")
        for layer in range(2)
        for half in ("key", "value")
    }
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "write_indices": ["batch"],
        "logits_indices": ["batch", "kept"],
        "logits": ["batch", "kept", "97"],
        **caches,
    }


@pytest.mark.parametrize("config", CASES)
def test_the_last_mlp_runs_for_the_columns_alone_whose_logits_are_asked_for(
    traced: Any, config: dict[str, Any]
) -> None:
    spec, model, _ = optimized(traced, **config)
    widths = {}
    for node in model.graph:
        if node.op_type == "MatMul":
            name = origin_of(node.inputs[1]).tensor.removeprefix("model.layers.").removesuffix("_proj.weight")
            widths[name] = str(node.outputs[0].shape[1])
    last = spec.layers - 1
    kept = {f"{last}.self_attn.o", f"{last}.mlp.up", f"{last}.mlp.down"}
    assert {name for name, width in widths.items() if width == "kept"} - {
        "lm_head.weight",
        "model.embed_tokens.weight",
    } == kept
    assert {widths[f"{last}.self_attn.{name}"] for name in "qkv"} == {"sequence"}
    assert sum(node.op_type == "GatherND" for node in model.graph) == 2


def test_no_trace_of_the_exporting_machine_stays_in_the_graph(traced: Any) -> None:
    _, model, _ = optimized(traced)
    assert not any(node.metadata_props or node.doc_string for node in model.graph)
