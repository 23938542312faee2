"""Rounded matrices: what the operators read must be the nearest point of the grid to what the checkpoint holds."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from exporter.evaluate.onnx_quantized import dequantized, from_blocks
from exporter.rounding import SCALES, VALUES, ZERO_POINTS, BlockInt4, BlockNBits, ChannelFp8
from runtime.errors import UserError


def matrix(out: int = 48, width: int = 256) -> torch.Tensor:
    torch.manual_seed(0)
    weights = torch.randn(out, width) * torch.logspace(-3, 1, out)[:, None]
    weights[3] = 0  # a channel that training never touched
    return weights


def run(op: str, inputs: dict[str, np.ndarray], fed: np.ndarray, out: list[int], **attributes: int) -> np.ndarray:
    """One operator of com.microsoft on ONNX Runtime, all inputs but the one that is fed constant; None left out."""
    integer = fed.dtype == np.int64
    kind = TensorProto.INT64 if integer else TensorProto.FLOAT
    others = [name for name in inputs if name != VALUES]
    order = ["x", VALUES, *others] if op == "MatMulNBits" else [VALUES, "x", *others]
    node = helper.make_node(op, order, ["y"], domain="com.microsoft", **attributes)
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", kind, fed.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)],
        [numpy_helper.from_array(array, name) for name, array in inputs.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": fed})[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_mean_to_onnxruntime_what_they_mean_here(bits: int, block: int, symmetric: bool) -> None:
    weights = matrix()
    parts = BlockNBits(bits, block, symmetric).apply(weights)
    assert {name: array.shape for name, array in parts.items()} == {
        name: shape for name, (_, shape) in BlockNBits(bits, block, symmetric).parts(tuple(weights.shape)).items()
    }
    points = torch.from_numpy(parts[ZERO_POINTS]) if ZERO_POINTS in parts else None
    ours = from_blocks(torch.from_numpy(parts[VALUES]), torch.from_numpy(parts[SCALES]), points, bits, block)
    x = np.eye(256, dtype=np.float32)
    product = run("MatMulNBits", parts, x, [256, 48], K=256, N=48, bits=bits, block_size=block, accuracy_level=1)
    np.testing.assert_allclose(product.T, ours.numpy(), atol=1e-6)
    table = parts | {VALUES: parts[VALUES].reshape(48, -1)}
    rows = np.array([[5, 0], [47, 3]])
    options = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    found = run("GatherBlockQuantized", table, rows, [2, 2, 256], **options)
    np.testing.assert_allclose(found, ours.numpy()[rows], atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_further_from_its_point_than_a_step_of_its_block(bits: int, symmetric: bool) -> None:
    weights = matrix()
    parts = BlockNBits(bits, 32, symmetric).apply(weights.bfloat16())
    points = torch.from_numpy(parts[ZERO_POINTS]) if ZERO_POINTS in parts else None
    ours = from_blocks(torch.from_numpy(parts[VALUES]), torch.from_numpy(parts[SCALES]), points, bits, 32)
    step = torch.from_numpy(np.abs(parts[SCALES])).repeat_interleave(32, 1)
    assert ((ours - weights.bfloat16().float()).abs() <= step * 1.001).all()
    assert (ours[3] == 0).all()


def test_int4_for_tensorrt_is_signed_symmetric_and_within_half_a_step() -> None:
    weights = matrix()
    parts = BlockInt4(128).apply(weights)
    packed = torch.from_numpy(parts[VALUES])
    values = torch.stack([packed & 15, packed >> 4], -1).reshape(256, 48).to(torch.int8)
    values = torch.where(values > 7, values - 16, values)
    scales = torch.from_numpy(parts[SCALES])
    assert (scales > 0).all()
    difference = (dequantized(values, scales, 0, 128).T - weights).abs()
    assert (difference <= 0.5001 * scales.T.repeat_interleave(128, 1)).all()


def test_fp8_keeps_three_bits_of_every_weight_that_is_not_tiny() -> None:
    weights = matrix()
    parts = ChannelFp8().apply(weights)
    values = torch.from_numpy(parts[VALUES]).view(torch.float8_e4m3fn)
    ours = dequantized(values, torch.from_numpy(parts[SCALES]), 1, 0).T
    big = weights.abs() > weights.abs().amax(1, keepdim=True) * 2**-6
    assert ((ours - weights).abs()[big] <= weights.abs()[big] * 2**-4 * 1.001).all()


def test_a_matrix_of_no_whole_blocks_is_refused_for_tensorrt_and_padded_for_onnxruntime() -> None:
    with pytest.raises(UserError, match="96 input features is not a whole number of blocks of 128"):
        BlockInt4(128).parts((4, 96))
    weights = matrix(8, 80)
    parts = BlockNBits(4, 32, False).apply(weights)
    x = np.eye(80, dtype=np.float32)
    product = run("MatMulNBits", parts, x, [80, 8], K=80, N=8, bits=4, block_size=32, accuracy_level=1)
    assert np.abs(product.T - weights.numpy()).max() < np.abs(parts[SCALES]).max()
