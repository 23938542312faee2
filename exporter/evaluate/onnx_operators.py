"""What each operator that the exporter emits means, as the ONNX specification has it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from exporter.evaluate import onnx_split, ops
from exporter.evaluate.onnx_attention import attention, group_query_attention
from exporter.evaluate.onnx_attributes import Attributes
from exporter.evaluate.onnx_quantized import dequantize_linear, gather_blocks, matmul_nbits
from exporter.evaluate.program import Compute

Tensor = torch.Tensor


def _plain(compute: Compute) -> Callable[[Attributes], Compute]:
    return lambda _: compute


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Compute:
    def compute(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return compute


def _axes(given: Tensor | None) -> tuple[int, ...]:
    return () if given is None else tuple(given.tolist())


def _cast(a: Attributes) -> Compute:
    """Nothing is computed: the edge it goes to has the dtype."""
    a.get("to")
    a.only("saturate", 1)
    return ops.UNARY["identity"]


def _shape(a: Attributes) -> Compute:
    window = slice(a.get("start", 0), a.get("end"))
    return lambda x: torch.tensor(list(x.shape)[window])


def _reshape(a: Attributes) -> Compute:
    a.only("allowzero", 0)

    def compute(x: Tensor, shape: Tensor) -> Tensor:
        return x.reshape([x.shape[i] if size == 0 else size for i, size in enumerate(shape.tolist())])

    return compute


def _slice(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    """x[start:end:step] on each axis, as Python slices count, for steps above 0."""
    places = range(starts.numel()) if axes is None else axes.tolist()
    strides = [1] * starts.numel() if steps is None else steps.tolist()
    for axis, start, end, step in zip(places, starts.tolist(), ends.tolist(), strides, strict=True):
        x = x[(slice(None),) * (axis % x.ndim) + (slice(start, end, step),)]
    return x


def _transpose(a: Attributes) -> Compute:
    order = a.get("perm")
    return lambda x: x.permute(*(order or range(x.ndim)[::-1]))


def _fused_matmul(a: Attributes) -> Compute:
    """`com.microsoft::FusedMatMul` of a matrix that may be stored transposed."""
    transposed = bool(a.get("transB", 0))
    return lambda x, y: ops.BINARY["matmul"](x, y.mT if transposed else y)


def _layer_norm(a: Attributes) -> Compute:
    axis, epsilon = a.get("axis", -1), a.get("epsilon", 1e-5)
    a.only("stash_type", 1)
    return lambda x, scale, bias=None: ops.normalize(x, scale, bias, range(axis % x.ndim, x.ndim), epsilon)


def _rotary(a: Attributes) -> Compute:
    a.only("interleaved", 0)
    a.only("num_heads", 0)
    width = a.get("rotary_embedding_dim", 0)
    return lambda x, cos, sin, positions=None: ops.rotate(x, cos, sin, positions, width)


def _contrib_rotary(a: Attributes) -> Compute:
    """`com.microsoft::RotaryEmbedding` of [batch, sequence, heads·head_dim], its positions before the tables."""
    a.only("interleaved", 0)
    heads, width = a.get("num_heads", 0), a.get("rotary_embedding_dim", 0)

    def compute(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        split = x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)
        return ops.rotate(split, cos, sin, positions, width).transpose(1, 2).reshape(x.shape)

    return compute


def _scatter(a: Attributes) -> Compute:
    a.only("mode", "linear")
    a.only("axis", -2, 2)
    return ops.write_cache


def _reduce(function: Callable[..., Tensor]) -> Callable[[Attributes], Compute]:
    def build(a: Attributes) -> Compute:
        keep = bool(a.get("keepdims", 1))
        a.only("noop_with_empty_axes", 0)
        return lambda x, axes=None: function(ops.wide(x), dim=_axes(axes) or tuple(range(x.ndim)), keepdim=keep)

    return build


def _concat(a: Attributes) -> Compute:
    axis = a.get("axis")
    return lambda *parts: torch.cat(parts, axis)


def _gelu(a: Attributes) -> Compute:
    return ops.UNARY["gelu_tanh" if a.only("approximate", "none", "tanh") == "tanh" else "gelu_erf"]


def _clip(_: Attributes) -> Compute:
    def compute(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        return ops.wide(x).clamp(None if low is None else low.item(), None if high is None else high.item())

    return compute


def _with_alpha(function: Callable[..., Tensor], default: float) -> Callable[[Attributes], Compute]:
    def build(a: Attributes) -> Compute:
        alpha = a.get("alpha", default)
        return lambda x: function(ops.wide(x), alpha)

    return build


OPERATORS: dict[str, Callable[[Attributes], Compute]] = {
    **{
        name: _plain(ops.UNARY[meaning])
        for name, meaning in {
            "Identity": "identity", "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Erf": "erf", "Exp": "exp",
            "Log": "log", "Sqrt": "sqrt", "Reciprocal": "reciprocal", "Neg": "neg", "Abs": "abs", "Floor": "floor",
            "Ceil": "ceil", "Sin": "sin", "Cos": "cos", "Not": "not", "Softplus": "softplus", "Mish": "mish",
            "HardSwish": "hard_swish",
        }.items()
    },
    **{
        name: _plain(_fold(ops.BINARY[meaning]))
        for name, meaning in {
            "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow", "Max": "max", "Min": "min",
            "Equal": "equal", "Less": "less", "Greater": "greater", "LessOrEqual": "less_or_equal",
            "GreaterOrEqual": "greater_or_equal", "And": "and", "Or": "or", "Xor": "xor", "MatMul": "matmul",
        }.items()
    },
    "Shape": _shape,
    "Cast": _cast,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Squeeze": _plain(ops.squeeze),
    "Unsqueeze": _plain(ops.unsqueeze),
    "Range": _plain(lambda start, limit, delta: torch.arange(start.item(), limit.item(), delta.item())),
    "Concat": _concat,
    "Slice": _plain(_slice),
    "Expand": _plain(lambda x, shape: x * torch.ones(shape.tolist(), dtype=x.dtype)),
    "Where": _plain(torch.where),
    "Gather": lambda a: partial(ops.gather, axis=a.get("axis", 0)),
    "GatherND": lambda a: partial(ops.gather_nd, batch_dims=a.get("batch_dims", 0)),
    "LayerNormalization": _layer_norm,
    "Softmax": lambda a: partial(ops.softmax, axis=a.get("axis", -1)),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMax": _reduce(torch.amax),
    "Gelu": _gelu,
    "Clip": _clip,
    "Elu": _with_alpha(torch.nn.functional.elu, 1.0),
    "Celu": _with_alpha(torch.nn.functional.celu, 1.0),
    "LeakyRelu": _with_alpha(torch.nn.functional.leaky_relu, 0.01),
    "RotaryEmbedding": _rotary,
    "TensorScatter": _scatter,
    "Attention": attention,
    "DequantizeLinear": dequantize_linear,
    "com.microsoft::FusedMatMul": _fused_matmul,
    "com.microsoft::MatMulNBits": matmul_nbits,
    "com.microsoft::GatherBlockQuantized": gather_blocks,
    "com.microsoft::RotaryEmbedding": _contrib_rotary,
    "com.microsoft::GroupQueryAttention": group_query_attention,
    "nemotron::SplitAttention": onnx_split.split,
    "nemotron::MergeAttention": onnx_split.merge,
}  # fmt: skip
