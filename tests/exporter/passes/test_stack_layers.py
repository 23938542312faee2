"""Tracing one layer and repeating it must give the graph that tracing all of them gives."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
from checkpoints import SMALL

from exporter.origin import is_weight, origin_of
from exporter.passes import Wanted, pipeline, run
from exporter.passes.base import PassFailed
from exporter.passes.clean_up import CleanUp
from exporter.passes.stack_layers import StackLayers
from exporter.recipe import precision_of, read_recipe
from exporter.rope import rope_tables
from exporter.spec import NemotronSpec, spec_from_config
from exporter.tasks import ANSWERS, FEATURES, GENERATION, SEQUENCES, TASKS, GraphForm
from exporter.trace import trace, trace_whole

Shape = list[tuple[Any, ...]]
GRAPHS: dict[str, tuple[str, dict[str, Any], GraphForm]] = {
    "a cache, biases": (GENERATION, {"attention_bias": True, "mlp_bias": True}, GraphForm()),
    "a cache and all that goes with it, a key/value head per query head": (
        GENERATION,
        {"num_key_value_heads": 4, "hidden_act": "gelu"},
        GraphForm(embeds=True, position_ids=True, hidden_states=True),
    ),
    "whole rows and all that goes with them, one key/value head": (
        GENERATION,
        {"num_key_value_heads": 1, "tie_word_embeddings": True},
        GraphForm(cache=False, embeds=True, position_ids=True, hidden_states=True, attentions=True),
    ),
    "features": (FEATURES, {}, GraphForm(cache=False, hidden_states=True)),
    "labels of rows": (SEQUENCES, {"pad_token_id": 3}, GraphForm(cache=False)),
    "answers": (ANSWERS, {}, GraphForm(cache=False, attentions=True)),
}


def spec_of(**config: Any) -> NemotronSpec:
    return spec_from_config({"model_type": "nemotron", **SMALL, "num_hidden_layers": 3, **config}, "test")


def shape_of(model: ir.Model) -> Shape:
    """Nodes in order, each with its attributes and the nodes and names that its inputs come from."""
    index = {output: (i, j) for i, node in enumerate(model.graph) for j, output in enumerate(node.outputs)}

    def origin(value: ir.Value | None) -> Any:
        if value is None or value in index:
            return None if value is None else index[value]
        return value.name if value.const_value is None else value.const_value.numpy().tolist()

    return [
        (n.op_type, sorted((k, str(a.value)) for k, a in n.attributes.items()), [origin(v) for v in n.inputs])
        for n in model.graph
    ]


def interface_of(model: ir.Model) -> list[tuple[Any, ...]]:
    return [(v.name, v.dtype, [str(dim) for dim in v.shape]) for v in (*model.graph.inputs, *model.graph.outputs)]


def weights_of(model: ir.Model) -> dict[str, Any]:
    weights = [value for value in model.graph.initializers.values() if is_weight(value)]
    return {str(value.name): (origin_of(value), list(value.shape), value.dtype) for value in weights}


# Each traces three layers; one of them is told at once.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "config", "form"),
    GRAPHS.values(),
    ids=GRAPHS,
)
def test_a_stack_of_three_is_the_trace_of_three(task: str, config: dict[str, Any], form: GraphForm) -> None:
    spec = spec_of(**config)
    whole, stacked = (make(spec, TASKS[task], cached=form.cache) for make in (trace_whole, trace))
    CleanUp()(whole)
    wanted = Wanted(task, form, precision_of("tensorrt", "fp16", read_recipe(None)))
    reports = [run(pipeline(spec, *rope_tables(spec, spec.max_positions), wanted), m) for m in (stacked, whole)]
    assert interface_of(stacked) == interface_of(whole)
    assert sorted(stacked.graph.initializers) == sorted(whole.graph.initializers)
    assert weights_of(stacked) == weights_of(whole)
    assert shape_of(stacked) == shape_of(whole)
    assert list(stacked.functions) == list(whole.functions)
    ours, theirs = ({r.name: r.count for r in rs if r.name not in {"stack_layers", "clean_up"}} for rs in reports)
    assert ours == theirs  # of the whole model, however many layers a pass has seen


def test_a_graph_of_another_depth_is_not_stacked() -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(2)]
    weights = [ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT)) for name in names]
    model = ir.Model(ir.Graph([], [], nodes=[], initializers=weights, name="g"), ir_version=11)
    with pytest.raises(PassFailed, match="stack_layers: the graph has 2 layers, to be stacked it should have one"):
        StackLayers(spec_of())(model)
