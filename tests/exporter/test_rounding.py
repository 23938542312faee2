"""Rounded matrices: what the operators read must be the nearest point of the grid to what the checkpoint holds."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as library

from exporter.evaluate.onnx_quantized import dequantized, from_blocks
from exporter.rounding import (
    SCALES,
    VALUES,
    ZERO_POINTS,
    BlockInt4,
    BlockNBits,
    BlockRounding,
    ChannelFp8,
    Rounding,
)
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


def by_onnxruntime(weights: torch.Tensor, bits: int, block: int, symmetric: bool) -> dict[str, np.ndarray]:
    """What ONNX Runtime's own quantiser makes of a matrix [out, in]."""
    (out, width), blocks = weights.shape, -(-weights.shape[1] // block)
    quantize = {4: library.quantize_matmul_4bits, 8: library.quantize_matmul_8bits}[bits]
    values = np.zeros((out, blocks, block * bits // 8), np.uint8)
    scales, zeros = np.zeros(out * blocks, np.float32), np.zeros(out * -(-blocks * bits // 8), np.uint8)
    quantize(values, np.ascontiguousarray(weights.float().numpy().T), scales, zeros, block, out, width, symmetric)
    parts = {VALUES: values, SCALES: scales.reshape(out, blocks)}
    return parts if symmetric else parts | {ZERO_POINTS: zeros.reshape(out, -1)}


@pytest.mark.parametrize("width", [256, 96, 80])
@pytest.mark.parametrize("kind", ["normal", "bfloat16", "halves of steps", "tiny and huge", "one sign"])
def test_blocks_are_to_the_bit_what_onnxruntimes_quantiser_makes_of_them(kind: str, width: int) -> None:
    torch.manual_seed(1)
    weights = {
        "normal": lambda: torch.randn(64, width),
        "bfloat16": lambda: torch.randn(64, width).bfloat16(),
        "halves of steps": lambda: torch.randint(-16, 17, (64, width)) / 2,
        "tiny and huge": lambda: torch.randn(64, width) * torch.logspace(-44, 36, 64)[:, None],
        "one sign": lambda: torch.rand(64, width) * torch.tensor([1, -1]).repeat(32)[:, None],
    }[kind]()
    weights[3] = 0
    for bits, block, symmetric in itertools.product((4, 8), (32, 64, 128), (True, False)):
        ours, theirs = (
            BlockNBits(bits, block, symmetric).apply(weights),
            by_onnxruntime(weights, bits, block, symmetric),
        )
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert (ours[name].shape, ours[name].dtype) == (array.shape, array.dtype)
            assert ours[name].tobytes() == array.tobytes(), (name, bits, block, symmetric)


@pytest.mark.parametrize("rounding", [BlockNBits(4, 32, False), BlockNBits(8, 32, True), BlockInt4(64), ChannelFp8()])
def test_rows_are_rounded_alike_whatever_rows_are_rounded_with_them(rounding: Rounding) -> None:
    weights = matrix()
    whole, pieces = rounding.apply(weights), [rounding.apply(rows) for rows in torch.split(weights, 16)]
    shapes = {name: shape for name, (_, shape) in rounding.parts((16, 256)).items()}
    for name, array in whole.items():
        shape = shapes[name] if pieces[0][name].size == np.prod(shapes[name]) else (256, 8)  # of int4, in bytes
        parts = [piece[name].reshape(shape) for piece in pieces]
        np.testing.assert_array_equal(np.concatenate(parts, rounding.axis).reshape(-1), array.reshape(-1))


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


BLOCKED = [BlockNBits(4, 32, False), BlockNBits(4, 32, True), BlockNBits(8, 32, False), BlockNBits(8, 32, True)]
NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32)


@pytest.mark.parametrize("rounding", [*BLOCKED, BlockInt4(64)], ids=str)
@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(NUMBERS, min_size=1, max_size=32))
def test_a_code_stands_for_the_nearest_number_that_any_code_stands_for(
    rounding: BlockRounding, numbers: list[float]
) -> None:
    block = torch.tensor([numbers])
    grid = rounding.grid(block)
    codes = grid.codes(block)
    assert torch.equal(codes, codes.round())
    every = grid.numbers(torch.arange(grid.top + 1).float()[None]).double()
    assert bool(torch.isfinite(every).all())
    least = (every[..., None] - block.double()[:, None]).abs().amin(1)
    ours = (grid.numbers(codes).double() - block.double()).abs()
    assert bool((ours <= least * 1.001 + grid.scale.abs().double() * 1e-5).all())
    assert float(grid.numbers(grid.zero)) == 0  # what is not there must stay so
    torch.testing.assert_close(rounding.nearest(block), grid.numbers(codes), rtol=0, atol=0)


def parts_of_grids(rounding: BlockRounding, weights: torch.Tensor) -> tuple[dict[str, np.ndarray], torch.Tensor]:
    """What the codes of each block's grid are packed to, and what they stand for."""
    grids = [rounding.grid(block) for block in torch.split(weights, rounding.block, 1)]
    codes = [grid.codes(block) for grid, block in zip(grids, torch.split(weights, rounding.block, 1), strict=True)]
    scales, zeros = torch.cat([grid.scale for grid in grids], 1), torch.cat([grid.zero for grid in grids], 1)
    numbers = torch.cat([grid.numbers(code) for grid, code in zip(grids, codes, strict=True)], 1)
    return rounding.pack(torch.cat(codes, 1), scales, zeros), numbers


@pytest.mark.parametrize("width", [256, 224, 80])
@pytest.mark.parametrize("rounding", BLOCKED, ids=str)
def test_codes_that_others_chose_mean_the_same_to_onnxruntime(rounding: BlockNBits, width: int) -> None:
    weights = matrix(48, width)
    parts, numbers = parts_of_grids(rounding, weights)
    x = np.eye(width, dtype=np.float32)
    options = {"bits": rounding.bits, "block_size": rounding.block, "accuracy_level": 1}
    product = run("MatMulNBits", parts, x, [width, 48], K=width, N=48, **options)
    np.testing.assert_allclose(product.T, numbers.numpy(), atol=1e-6)


def test_codes_that_others_chose_mean_the_same_to_dequantize_linear() -> None:
    rounding, weights = BlockInt4(64), matrix(47)
    parts, numbers = parts_of_grids(rounding, weights)
    packed = helper.make_tensor("values", TensorProto.INT4, [256, 47], parts[VALUES].tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["values", "scales"], ["y"], axis=0, block_size=64)],
        "test",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [256, 47])],
        [packed, numpy_helper.from_array(parts[SCALES], "scales")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(np.asarray(session.run(None, {})[0]).T, numbers.numpy())


@pytest.mark.parametrize("rounding", [*BLOCKED, BlockInt4(64), ChannelFp8()], ids=str)
def test_what_a_choice_is_judged_by_is_as_far_off_as_what_is_stored(rounding: Rounding) -> None:
    weights = matrix()
    parts = rounding.apply(weights)
    values, scales = torch.from_numpy(parts[VALUES]), torch.from_numpy(parts[SCALES])
    if isinstance(rounding, BlockNBits):
        points = torch.from_numpy(parts[ZERO_POINTS]) if ZERO_POINTS in parts else None
        stored = from_blocks(values, scales, points, rounding.bits, rounding.block)
    elif isinstance(rounding, BlockInt4):
        nibbles = torch.stack([values & 15, values >> 4], -1).reshape(256, 48).to(torch.int8)
        stored = dequantized(torch.where(nibbles > 7, nibbles - 16, nibbles), scales, 0, 64).T
    else:
        stored = dequantized(values.view(torch.float8_e4m3fn), scales, 1, 0).T
    judged, lost = ((other - weights).square().sum(1) for other in (rounding.nearest(weights), stored))
    torch.testing.assert_close(judged, lost, rtol=0.05, atol=1e-9)
