"""Tracing one layer and repeating it must give the graph that tracing all of them gives."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from checkpoints import SMALL

from exporter.passes import pipeline, run
from exporter.passes.clean_up import CleanUp
from exporter.rope import rope_tables
from exporter.spec import spec_from_config
from exporter.trace import trace, trace_whole


def shape_of(model: ir.Model) -> list[tuple[Any, ...]]:
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


def test_a_stack_of_three_is_the_trace_of_three() -> None:
    spec = spec_from_config({"model_type": "nemotron", **SMALL, "num_hidden_layers": 3, "attention_bias": True}, "test")
    whole, stacked = trace_whole(spec), trace(spec)
    CleanUp()(whole)
    assert len(whole.graph) == len(stacked.graph)
    for model in (whole, stacked):  # the passes drop what reads the batch off some layer's cache, no matter which
        run(pipeline(spec, *rope_tables(spec, spec.max_positions)), model)
    for values in ("inputs", "outputs"):
        ours, theirs = ([value.name for value in getattr(m.graph, values)] for m in (stacked, whole))
        assert ours == theirs
    assert sorted(stacked.graph.initializers) == sorted(whole.graph.initializers)
    assert shape_of(stacked) == shape_of(whole)
