"""Each operator means here what ONNX's reference implementation says, and each edge is rounded to its own dtype."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from exporter.evaluate.onnx_graph import compile_graph
from exporter.evaluate.program import CannotEvaluate
from exporter.evaluate.tensors import as_torch, read_tensor
from plugins.reference import partial_rope_attention


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def one_node(op: str, inputs: list[np.ndarray | None], outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
    """A model of one node whose inputs are the graph's; None is an input left out."""
    names = ["" if array is None else f"x{i}" for i, array in enumerate(inputs)]
    node = helper.make_node(op, names, [f"y{i}" for i in range(outputs)], name="node", domain=domain, **attributes)
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in zip(names, inputs, strict=True)
        if array is not None
    ]
    made = [helper.make_empty_tensor_value_info(f"y{i}") for i in range(outputs)]
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "g", given, made), opset_imports=opsets)


def tensor(array: np.ndarray) -> torch.Tensor:
    bits = array.dtype == ml_dtypes.bfloat16
    return as_torch(array.view(np.int16)).view(torch.bfloat16) if bits else as_torch(array)


def evaluated(model: onnx.ModelProto, inputs: list[np.ndarray | None]) -> list[torch.Tensor]:
    feeds = {f"x{i}": tensor(array) for i, array in enumerate(inputs) if array is not None}
    program = compile_graph(ir.from_proto(model))
    return list(program.run(feeds).outputs.values())


X, POSITIVE = noise(2, 3, 4), np.abs(noise(2, 3, 4)) + 0.1
FLAGS = np.array([[True, False], [False, True]])
CASES: list[tuple[str, list[np.ndarray | None], dict[str, Any]]] = [
    *[(op, [X], {}) for op in ("Identity", "Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Neg", "Abs", "Floor", "Ceil")],
    *[(op, [X], {}) for op in ("Sin", "Cos", "Softplus", "Mish", "HardSwish", "Gelu", "Elu", "LeakyRelu", "Celu")],
    *[(op, [POSITIVE], {}) for op in ("Log", "Sqrt", "Reciprocal")],
    *[(op, [X, noise(3, 1, seed=1)], {}) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Less", "Greater")],
    *[(op, [ints(1, 2, 3), ints(3, 2, 1)], {}) for op in ("Equal", "LessOrEqual", "GreaterOrEqual", "Add")],
    *[(op, [FLAGS, FLAGS[::-1].copy()], {}) for op in ("And", "Or", "Xor")],
    ("Not", [FLAGS], {}),
    ("Gelu", [X], {"approximate": "tanh"}),
    ("Elu", [X], {"alpha": 0.5}),
    ("Div", [ints(7, -7), ints(2, 2)], {}),
    ("Pow", [POSITIVE, np.array(3.0, np.float32)], {}),
    ("Clip", [X, np.array(0.0, np.float32), np.array(0.5, np.float32)], {}),
    ("Clip", [X, None, np.array(0.5, np.float32)], {}),
    ("MatMul", [X, noise(4, 5)], {}),
    ("Shape", [X], {}),
    ("Shape", [X], {"start": 1, "end": 2}),
    ("Cast", [X * 100], {"to": TensorProto.INT64}),
    ("Reshape", [X, ints(0, -1)], {}),
    ("Transpose", [X], {"perm": [1, 0, 2]}),
    ("Squeeze", [X[:, :1]], {}),
    ("Squeeze", [X[:1, :1], ints(0)], {}),
    ("Unsqueeze", [X, ints(-1, 0)], {}),
    ("Range", [np.array(2), np.array(11), np.array(3)], {}),
    ("Concat", [X, X[:, :1]], {"axis": 1}),
    ("Expand", [X[:, :1], ints(3, 1)], {}),
    ("Where", [FLAGS, noise(2, 2), noise(2, 2, seed=1)], {}),
    ("Gather", [X, ints(2, -1)], {"axis": 1}),
    ("Gather", [noise(5, 2), np.array([[0, 4], [1, 1]])], {}),
    ("GatherND", [X, np.array([[[0], [2]], [[1], [1]]])], {"batch_dims": 1}),
    ("GatherND", [X, np.array([[0, 2], [1, 1]])], {}),
    ("LayerNormalization", [X, noise(4), noise(4, seed=1)], {"epsilon": 1e-3}),
    ("LayerNormalization", [X, noise(3, 4)], {"axis": 1}),
    ("Softmax", [X], {"axis": 1}),
    ("ReduceMean", [X, ints(1)], {"keepdims": 0}),
    ("ReduceSum", [X], {}),
    ("ReduceMax", [X, ints(-1)], {}),
]


@pytest.mark.parametrize(("op", "inputs", "attributes"), CASES, ids=lambda x: x if isinstance(x, str) else "")
def test_an_operator_means_what_onnx_says(op: str, inputs: list[np.ndarray | None], attributes: dict[str, Any]) -> None:
    model = one_node(op, inputs, **attributes)
    feeds = {f"x{i}": array for i, array in enumerate(inputs) if array is not None}
    expected = ReferenceEvaluator(model).run(None, feeds)[0]
    (found,) = evaluated(model, inputs)
    assert found.numpy().dtype == expected.dtype
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6, atol=2e-6, strict=True)


@pytest.mark.parametrize("width", [0, 4])
def test_rotation_is_that_of_onnx(width: int) -> None:
    rotated = width or 8
    inputs = [
        noise(2, 3, 5, 8),
        noise(9, rotated // 2),
        noise(9, rotated // 2, seed=1),
        np.arange(10).reshape(2, 5) % 9,
    ]
    model = one_node("RotaryEmbedding", inputs, rotary_embedding_dim=width)
    expected = ReferenceEvaluator(model).run(None, {f"x{i}": array for i, array in enumerate(inputs)})[0]
    np.testing.assert_allclose(evaluated(model, inputs)[0], expected, atol=1e-6)


def test_the_cache_is_written_as_onnx_says() -> None:
    inputs = [noise(2, 3, 6, 4), noise(2, 3, 2, 4, seed=1), ints(4, 1)]
    model = one_node("TensorScatter", inputs, axis=-2)
    expected = ReferenceEvaluator(model).run(None, {f"x{i}": array for i, array in enumerate(inputs)})[0]
    np.testing.assert_array_equal(evaluated(model, inputs)[0], expected)


ATTENTIONS = {
    "lengths": ({"is_causal": 1, "scale": 0.3}, None, ints(4, 7)),
    "no cache": ({"is_causal": 1}, None, None),
    "everything seen": ({}, None, None),
    "padding only": ({}, None, ints(4, 7)),
    "boolean mask": ({"scale": 0.3}, np.random.default_rng(3).random((2, 1, 3, 7)) < 0.7, None),
    "float mask": ({}, noise(2, 4, 3, 7, seed=4), None),
}


@pytest.mark.parametrize("case", ATTENTIONS)
def test_attention_sees_the_keys_that_onnx_says(case: str) -> None:
    attributes, mask, lengths = ATTENTIONS[case]
    if mask is not None and mask.dtype == bool:
        mask[..., 0] = True
    inputs = [noise(2, 4, 3, 8), noise(2, 2, 7, 8, seed=1), noise(2, 2, 7, 8, seed=2), mask, None, None, lengths]
    model = one_node("Attention", inputs, **attributes)
    feeds = {f"x{i}": array for i, array in enumerate(inputs) if array is not None}
    expected = ReferenceEvaluator(model).run(None, feeds)[0]
    np.testing.assert_allclose(evaluated(model, inputs)[0], expected, atol=1e-5)


@pytest.mark.parametrize("starts", [ints(0, 0), ints(3, 5)], ids=["prefill", "decode"])
def test_group_query_attention_is_the_fused_op(starts: np.ndarray) -> None:
    sequence, capacity, heads, kv_heads, width = (4 if not starts.any() else 1), 8, 4, 2, 16
    query, key, value = (noise(2, sequence, n * width, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    angles = np.outer(np.arange(capacity), 0.1 + np.arange(4)).astype(np.float32)
    past = [noise(2, kv_heads, capacity, width, seed=i) for i in (7, 8)]
    last = (starts + sequence - 1).astype(np.int32)
    total = np.array(last.max() + 1, np.int32)
    inputs = [query, key, value, *past, last, total, np.cos(angles), np.sin(angles)]
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": 0.2, "do_rotary": 1}
    found = evaluated(one_node("GroupQueryAttention", inputs, 3, "com.microsoft", **attributes), inputs)
    expected = partial_rope_attention(
        query, key, value, inputs[7], inputs[8], *past, starts, heads=heads, kv_heads=kv_heads, scale=0.2
    )
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["fp16", "bf16"])
def test_products_are_summed_in_fp32_and_rounded_once(dtype: Any) -> None:
    """Sums of 4096 products kept in 16 bit would stall at the first few hundred."""
    a, b = noise(2, 4096).astype(dtype), np.abs(noise(4096, 3, seed=1)).astype(dtype)
    (found,) = evaluated(one_node("MatMul", [a, b]), [a, b])
    exact = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(found.double(), exact, rtol=float(ml_dtypes.finfo(dtype).eps), atol=1e-3)
    assert found.dtype == tensor(a).dtype


def test_a_value_beyond_the_range_is_infinite_and_its_edge_is_named() -> None:
    x = np.array([200.0, 300.0], np.float16)
    program = compile_graph(ir.from_proto(one_node("Mul", [x, x])))
    result = program.run({"x0": tensor(x), "x1": tensor(x)})
    assert result.non_finite == ["y0"]
    assert result.outputs["y0"].tolist() == [40000.0, float("inf")]


@pytest.mark.parametrize(
    ("node", "named"),
    [
        (("Conv", [X, X], {}), "operator Conv"),
        (("Attention", [X, X, X], {"softcap": 5.0}), "softcap=5.0 of Attention node"),
        (("TensorScatter", [X, X], {"mode": "circular"}), "mode='circular' of TensorScatter node"),
        (("RotaryEmbedding", [X, X, X], {"interleaved": 1}), "interleaved=1 of RotaryEmbedding node"),
        (("Relu", [X], {"slope": 0.5}), "attribute slope of Relu node"),
        (("Relu", [X.astype(np.float64)], {}), "dtype DOUBLE of value x0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_has_no_meaning_here_is_refused_by_name(node: Any, named: str) -> None:
    op, inputs, attributes = node
    with pytest.raises(CannotEvaluate, match=f"the evaluation knows no .*{named}"):
        compile_graph(ir.from_proto(one_node(op, inputs, **attributes)))


def test_a_dtype_declared_against_onnx_is_refused() -> None:
    model = one_node("Relu", [X])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y0", TensorProto.FLOAT16, X.shape))
    with pytest.raises(CannotEvaluate, match="by which y0 is FLOAT16"):
        compile_graph(ir.from_proto(model))


def test_an_input_with_a_default_may_be_left_out() -> None:
    model = one_node("Add", [X, X])
    model.graph.initializer.append(numpy_helper.from_array(np.ones_like(X), "x1"))
    program = compile_graph(ir.from_proto(model))
    np.testing.assert_allclose(program.run({"x0": tensor(X)}).outputs["y0"], X + 1)


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_matrix_is_multiplied_as_it_is_stored_as_onnxruntime_does(transposed: int) -> None:
    x, y = noise(2, 3, 4), noise(5, 4, seed=1)
    inputs: list[np.ndarray | None] = [x, y if transposed else np.ascontiguousarray(y.T)]
    model = one_node("FusedMatMul", inputs, domain="com.microsoft", transB=transposed)
    (found,) = evaluated(model, inputs)
    np.testing.assert_allclose(found.numpy(), x @ y.T, rtol=1e-6, atol=1e-6)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(found.numpy(), session.run(None, {"x0": inputs[0], "x1": inputs[1]})[0], atol=1e-6)


@pytest.mark.parametrize("offset", [0, 2, 3])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.BFLOAT16, ir.DataType.FLOAT16], ids=str)
def test_a_weight_is_read_from_any_place_of_a_file_that_has_other_names(tmp_path, dtype, offset: int) -> None:
    values = noise(4, 3).astype(dtype.numpy())
    (tmp_path / "file").write_bytes(b"?" * offset + values.tobytes() + b"?")
    (tmp_path / "other").hardlink_to(tmp_path / "file")
    external = ir.ExternalTensor(
        "other", offset, values.nbytes, dtype, shape=ir.Shape([4, 3]), name="w", base_dir=tmp_path
    )
    np.testing.assert_array_equal(read_tensor(external).float().numpy(), values.astype(np.float32))
