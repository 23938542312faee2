"""The graph that an engine with the attention kernels is built of, evaluated: the bundle's graph, and the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from split_cases import Case

from exporter.checkpoint import Checkpoint
from exporter.evaluate.onnx_graph import compile_graph
from exporter.evaluate.session import evaluate_graph
from exporter.evaluate.tensors import as_torch
from exporter.plugin_attention import use_split_attention
from exporter.verify import gate, run_gate, verify
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.golden import replay

Bundles = Callable[[str], Path]

TYPES = {
    "float32": (np.float32, ir.DataType.FLOAT),
    "float16": (np.float16, ir.DataType.FLOAT16),
    "bfloat16": (ml_dtypes.bfloat16, ir.DataType.BFLOAT16),
}
PREFILL = Case(4, 2, 32, 16, lengths=(70, 70), sequence=70, capacity=150)
DECODE = Case(6, 2, 16, 16, lengths=(5, 300, 129), sequence=1, capacity=400)
CHUNK = Case(4, 1, 32, 8, lengths=(66, 9), sequence=3, capacity=128)


def tensor(array: np.ndarray) -> torch.Tensor:
    """The same numbers in the same type."""
    if array.dtype == ml_dtypes.bfloat16:
        return as_torch(array.view(np.int16)).view(torch.bfloat16)
    return as_torch(array)


def two_ops(case: Case, dtype: ir.DataType) -> ir.Model:
    """SplitAttention and MergeAttention over a case's inputs."""
    types = [dtype] * 5 + [ir.DataType.INT32]
    names = ("query", "cos", "sin", "key_cache", "value_cache", "lengths")
    shapes = [array.shape for array in case.inputs()]
    given = [ir.val(name, dtype=t, shape=s) for name, t, s in zip(names, types, shapes, strict=True)]
    attributes: dict[str, Any] = {
        "heads": case.heads,
        "kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "rotary_dim": case.rotary_dim,
        "scale": case.scale,
        "plugin_namespace": "nemotron_0",
        "plugin_version": "1",
        "aot": 1,
    }
    split = ir.node("SplitAttention", given, attributes, domain="nemotron", num_outputs=3)
    merge = ir.node("MergeAttention", [*split.outputs, given[5]], {"to": int(dtype)}, domain="nemotron")
    for value, name in zip((*split.outputs, *merge.outputs), ("maxima", "sums", "contexts", "context"), strict=True):
        value.name = name
    graph = ir.Graph(given, merge.outputs, nodes=[split, merge], opset_imports={"": 24, "nemotron": 1}, name="two")
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("case", [PREFILL, DECODE, CHUNK], ids=["prefill", "decode", "chunk"])
def test_the_ops_are_a_softmax_over_the_keys_that_a_query_sees(case: Case, name: str) -> None:
    dtype, onnx_dtype = TYPES[name]
    program = compile_graph(two_ops(case, onnx_dtype))
    feeds = dict(zip((edge.name for edge in program.inputs), map(tensor, case.inputs(dtype)), strict=True))
    result = program.run(feeds)
    assert result.non_finite == []  # neither what is undefined, nor the NaN of a cache where no key is
    context = result.outputs["context"]
    assert context.dtype == feeds["query"].dtype
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}[name]
    np.testing.assert_allclose(context.float().numpy(), case.expected(dtype), atol=tolerance, rtol=tolerance)


def test_what_is_not_finite_is_named() -> None:
    program = compile_graph(two_ops(DECODE, ir.DataType.FLOAT))
    arrays = [array.copy() for array in DECODE.inputs()]
    arrays[4][1, :, 299] = np.inf  # the values of a key that row 1 sees
    feeds = dict(zip((edge.name for edge in program.inputs), map(tensor, arrays), strict=True))
    assert program.run(feeds).non_finite == ["contexts", "context"]


@pytest.mark.parametrize(
    "precision", ["fp16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fp32", "bf16"))]
)
def test_the_trained_checkpoint_passes_the_gate_with_the_kernels_ops(
    precision: str, tensorrt_bundle_of: Bundles, tiny_checkpoint: Path
) -> None:
    bundle = Bundle.open(tensorrt_bundle_of(precision))
    session = evaluate_graph(bundle, "plugin")
    result = run_gate(bundle, Checkpoint.open(tiny_checkpoint), session)
    assert result.parity.passed
    assert "with the attention kernels' ops" in result.parity.evaluated_by
    assert result.golden is not None
    assert all(comparison.passed for comparison in replay(session, result.golden))


@pytest.mark.slow
def test_the_gate_layer_by_layer_has_the_kernels_ops_too(tensorrt_bundle: Path, tiny_checkpoint: Path) -> None:
    bundle, checkpoint = Bundle.open(tensorrt_bundle), Checkpoint.open(tiny_checkpoint)
    parity = gate(bundle, checkpoint, attention="plugin", layered=True).parity
    assert parity.passed
    assert "with the attention kernels' ops, layer by layer" in parity.evaluated_by


def test_verify_checks_the_graph_with_the_kernels_ops(
    tensorrt_bundle: Path, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    parity = verify(tensorrt_bundle, tiny_checkpoint, attention="plugin")
    assert parity.passed
    assert "kernels' ops" in parity.evaluated_by
    with pytest.raises(UserError, match="is not one that engines with the attention kernels are built of"):
        verify(tiny_bundle, tiny_checkpoint, attention="plugin")


@pytest.mark.parametrize(("precision", "limit"), [("fp16", 0.04), ("bf16", 0.3)])
def test_the_kernels_ops_give_what_native_attention_gives(
    precision: str, limit: float, tensorrt_bundle_of: Bundles
) -> None:
    """Logits are 17 at most; a last bit of them is 0.016 in fp16, 0.125 in bf16."""
    bundle = Bundle.open(tensorrt_bundle_of(precision))
    native, ours = (evaluate_graph(bundle, form).reopen(slots=2, capacity=200) for form in ("native", "plugin"))
    tokens = np.random.default_rng(0).integers(5, bundle.vocab_size, size=(2, 90))
    for lengths, past in (([90, 70], [0, 0]), ([1, 1], [90, 70]), ([5, 3], [91, 71])):
        step = (tokens[:, : max(lengths)], np.array(lengths), np.array(past))
        expected, found = native.step(*step), ours.step(*step)
        np.testing.assert_allclose(found, expected, atol=limit)
        assert (found.argmax(-1) == expected.argmax(-1)).all()


def test_every_attention_is_replaced_and_the_cache_is_written_as_before(tensorrt_bundle: Path) -> None:
    model = ir.load(tensorrt_bundle / "model.onnx")
    before = [node.op_type for node in model.graph]
    use_split_attention(model, Bundle.open(tensorrt_bundle))
    after = [node.op_type for node in model.graph]
    assert (before.count("Attention"), after.count("Attention")) == (4, 0)
    assert (after.count("SplitAttention"), after.count("MergeAttention")) == (4, 4)
    assert after.count("TensorScatter") == before.count("TensorScatter") == 8
    assert (before.count("RotaryEmbedding"), after.count("RotaryEmbedding")) == (8, 4)
    known = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for node in model.graph:
        assert known >= {value.name for value in node.inputs if value is not None}, f"{node.name} stands too early"
        known |= {value.name for value in node.outputs}


def _acausal(node: ir.Node) -> None:
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)


def _capped(node: ir.Node) -> None:
    node.attributes["softcap"] = ir.AttrFloat32("softcap", 30.0)


def _other_lengths(node: ir.Node) -> None:
    node.replace_input_with(6, node.graph.inputs[1])


def _own_keys(node: ir.Node) -> None:
    node.replace_input_with(1, node.inputs[1].producer().inputs[1])


def _other_positions(node: ir.Node) -> None:
    rotary = node.inputs[0].producer()
    rotary.replace_input_with(3, node.graph.inputs[0])


def _read_twice(node: ir.Node) -> None:
    node.graph.outputs.append(node.outputs[0])
    node.graph.append(ir.node("Relu", [node.inputs[0]]))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_acausal, "is_causal=0"),
        (_capped, "softcap=30.0"),
        (_other_lengths, "an input of the graph where Add should be"),
        (_own_keys, "RotaryEmbedding where TensorScatter should be"),
        (_other_positions, "an input of the graph where Add should be"),
        (_read_twice, "a RotaryEmbedding that others read too"),
    ],
)
def test_an_attention_of_another_form_is_refused_by_name(
    tensorrt_bundle: Path, change: Callable[[ir.Node], None], named: str
) -> None:
    model = ir.load(tensorrt_bundle / "model.onnx")
    node = [node for node in model.graph if node.op_type == "Attention"][2]
    change(node)
    with pytest.raises(UserError, match="build with --attention native") as refused:
        use_split_attention(model, Bundle.open(tensorrt_bundle))
    assert f"{node.name} has no form for SplitAttention: {named}" in str(refused.value)


def test_a_layer_without_attention_is_refused(tensorrt_bundle: Path) -> None:
    model = ir.load(tensorrt_bundle / "model.onnx")
    next(node for node in model.graph if node.op_type == "Attention").op_type = "Unknown"
    with pytest.raises(UserError, match="3 attentions of 1 shapes in 4 layers"):
        use_split_attention(model, Bundle.open(tensorrt_bundle))


def test_a_bundle_for_onnxruntime_is_refused(tiny_bundle: Path) -> None:
    model = ir.load(tiny_bundle / "model.onnx")
    with pytest.raises(UserError, match="no cache for TensorRT"):
        use_split_attention(model, Bundle.open(tiny_bundle))
