"""A quantised cache means in the evaluation what ONNX Runtime's kernel does, integer by integer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from exporter.evaluate.onnx_graph import compile_graph
from exporter.evaluate.tensors import as_torch

HEADS, KV_HEADS, WIDTH, ROTARY, CAPACITY = 4, 2, 32, 16, 16
FLOATS = {"fp32": (np.float32, TensorProto.FLOAT), "fp16": (np.float16, TensorProto.FLOAT16)}

CASES = {
    "prefill": ([0], [7]),
    "prefill of unequal rows": ([0, 0, 0], [7, 3, 5]),
    "decode": ([5, 2, 9], [1, 1, 1]),
    "chunk": ([5], [4]),
    "end of capacity": ([12], [4]),
}


def feeds_of(past: list[int], lengths: list[int], dtype: Any, rotates: bool, stretch: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    batch, sequence = len(past), max(lengths)

    def noise(heads: int, by: float = 1.0) -> np.ndarray:
        return (by * random.standard_normal((batch, sequence, heads * WIDTH))).astype(dtype)

    angles = np.arange(64)[:, None] * 10000.0 ** (-np.arange(ROTARY // 2) / (ROTARY // 2))
    valid = np.array(past) + lengths
    feeds = {
        "query": noise(HEADS),
        "key": noise(KV_HEADS, stretch),
        "value": noise(KV_HEADS, stretch),
        "past_key": random.integers(-128, 128, (batch, KV_HEADS, CAPACITY, WIDTH)).astype(np.int8),
        "past_value": random.integers(-128, 128, (batch, KV_HEADS, CAPACITY, WIDTH)).astype(np.int8),
        "last_key": (valid - 1).astype(np.int32),
        "total": np.array(valid.max(), np.int32),
        "cos": np.cos(angles).astype(dtype),
        "sin": np.sin(angles).astype(dtype),
    }
    if not rotates:
        del feeds["cos"], feeds["sin"]
    scales = {name: random.uniform(2, 4, (1, KV_HEADS, 1, WIDTH)) / 127 for name in ("k_scale", "v_scale")}
    return feeds | {name: scale.astype(np.float32) for name, scale in scales.items()}


def model_of(feeds: dict[str, np.ndarray], element: int, rotates: bool) -> Any:
    names = [*list(feeds)[:7], *(("cos", "sin") if rotates else ("", "")), "", "", "", "k_scale", "v_scale"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["context", "present_key", "present_value"],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
        scale=WIDTH**-0.5,
        **({"do_rotary": 1} if rotates else {}),
        kv_cache_bit_width=8,
        k_quant_type="PER_CHANNEL",
        v_quant_type="PER_CHANNEL",
    )
    given = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    made = [helper.make_tensor_value_info("context", element, None)]
    made += [helper.make_tensor_value_info(name, TensorProto.INT8, None) for name in ("present_key", "present_value")]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "g", given, made), opset_imports=opsets, ir_version=10)


def run_in_place(model: Any, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """As sessions do: past and present are one buffer."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    context = np.zeros_like(feeds["query"])
    caches = {name: feeds[f"past_{name}"].copy() for name in ("key", "value")}
    binding = session.io_binding()
    inputs = feeds | {f"past_{name}": cache for name, cache in caches.items()}
    outputs = {"context": context} | {f"present_{name}": cache for name, cache in caches.items()}
    for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, array in arrays.items():
            bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    return [context, *caches.values()]


@pytest.mark.parametrize("rotates", [True, False], ids=["rotation inside", "rotated before"])
@pytest.mark.parametrize("precision", FLOATS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stretch", [1.0, 4.0], ids=["within the range", "clipped"])
def test_the_evaluation_rounds_and_reads_as_the_kernel(
    case: str, precision: str, rotates: bool, stretch: float
) -> None:
    dtype, element = FLOATS[precision]
    past, lengths = CASES[case]
    feeds = feeds_of(past, lengths, dtype, rotates, stretch)
    model = model_of(feeds, element, rotates)
    expected = run_in_place(model, feeds)
    result = compile_graph(ir.from_proto(model)).run({name: as_torch(array) for name, array in feeds.items()})
    context, *caches = result.outputs.values()
    for row, valid in enumerate(np.array(past) + lengths):
        for found, wanted in zip(caches, expected[1:], strict=True):
            np.testing.assert_array_equal(found[row, :, :valid].numpy(), wanted[row, :, :valid])
        found, wanted = context[row, : lengths[row]].float().numpy(), expected[0][row, : lengths[row]]
        np.testing.assert_allclose(found, wanted.astype(np.float32), atol=1e-5 if precision == "fp32" else 1e-2)


def test_a_tie_goes_to_the_even_integer() -> None:
    feeds = feeds_of([0], [7], np.float32, False, 1.0)
    feeds["k_scale"] = np.full((1, KV_HEADS, 1, WIDTH), 0.125, np.float32)
    steps = np.arange(feeds["key"].size).reshape(feeds["key"].shape) / 2 - 112
    feeds["key"] = (steps * 0.125).astype(np.float32)
    expected = np.clip(np.rint(steps), -128, 127).reshape(1, 7, KV_HEADS, WIDTH).transpose(0, 2, 1, 3)
    model = model_of(feeds, TensorProto.FLOAT, False)
    np.testing.assert_array_equal(run_in_place(model, feeds)[1][:, :, :7], expected)
    result = compile_graph(ir.from_proto(model)).run({name: as_torch(array) for name, array in feeds.items()})
    np.testing.assert_array_equal(result.outputs["present_key"][:, :, :7].numpy(), expected)
