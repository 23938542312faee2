"""What each type of a TensorRT layer computes, as NVIDIA's API documents it.

What it leaves open is an assumption, named in this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from exporter.evaluate import ops
from exporter.evaluate.onnx_quantized import dequantized
from exporter.evaluate.program import CannotEvaluate, Compute
from plugins.tensorrt_network import LENGTHS_ASSUMPTION

Tensor = torch.Tensor

# The header gives LOWER_RIGHT as j ≤ i + (s_kv − s_q) and describes `key_value_lengths` apart. Here s_kv is a row's
# length where lengths are set, and the static capacity where they are not.
LOWER_RIGHT_COUNTS_FROM_LENGTHS = LENGTHS_ASSUMPTION


def _known(layer: Any, attribute: str, *allowed: str) -> str:
    """The name of an enum's value, which must be one of those that have a meaning here."""
    name = str(getattr(layer, attribute).name)
    if name not in allowed:
        raise CannotEvaluate(f"{attribute} {name} of {layer.name}")
    return name


def _shuffle(layer: Any) -> Compute:
    first, second = list(layer.first_transpose), list(layer.second_transpose)
    fixed = None if layer.num_inputs > 1 else layer.reshape_dims
    sizes = None if fixed is None else list(fixed)
    placeholder = layer.zero_is_placeholder

    def compute(x: Tensor, given: Tensor | None = None) -> Tensor:
        x = x.permute(first[: x.ndim])
        shape = sizes if given is None else given.tolist()
        if shape is not None:
            x = x.reshape([x.shape[i] if placeholder and not size else size for i, size in enumerate(shape)])
        return x.permute(second[: x.ndim])

    return compute


def _slice(layer: Any) -> Compute:
    _known(layer, "mode", "STRICT_BOUNDS")
    chosen = getattr(layer, "axes", None)
    axes = None if chosen is None else list(chosen)
    given = [i < layer.num_inputs and layer.get_input(i) is not None for i in (1, 2, 3)]
    names = ("start", "shape", "stride")
    fixed = [None if is_given else list(getattr(layer, name)) for name, is_given in zip(names, given, strict=True)]

    def compute(x: Tensor, *dynamic: Tensor | None) -> Tensor:
        given = (None if tensor is None else tensor.tolist() for tensor in (*dynamic, None, None, None))
        found = [known if known is not None else value for known, value in zip(fixed, given, strict=False)]
        for axis, (start, size, stride) in zip(axes or range(x.ndim), zip(*found, strict=True), strict=True):
            x = x.index_select(axis, start + stride * torch.arange(size))
        return x

    return compute


def _fill(layer: Any) -> Compute:
    _known(layer, "operation", "LINSPACE")
    if layer.num_inputs != 3:
        raise CannotEvaluate(f"FILL {layer.name} of a fixed shape")

    def compute(shape: Tensor, start: Tensor, delta: Tensor) -> Tensor:
        (size,) = shape.tolist()
        return start + delta * torch.arange(size)

    return compute


def _gather(layer: Any) -> Compute:
    if _known(layer, "mode", "DEFAULT", "ND") == "ND":
        return partial(ops.gather_nd, batch_dims=layer.num_elementwise_dims)
    if layer.num_elementwise_dims:
        raise CannotEvaluate(f"num_elementwise_dims of {layer.name}")
    return partial(ops.gather, axis=layer.axis)


def _matmul(layer: Any) -> Compute:
    turned = [_known(layer, name, "NONE", "TRANSPOSE") == "TRANSPOSE" for name in ("op0", "op1")]
    return lambda a, b: ops.BINARY["matmul"](a.mT if turned[0] else a, b.mT if turned[1] else b)


def _bits(mask: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(8) if mask >> axis & 1)


def _normalize(layer: Any) -> Compute:
    if layer.num_groups != 1:
        raise CannotEvaluate(f"num_groups {layer.num_groups} of {layer.name}")
    axes, epsilon = _bits(layer.axes), layer.epsilon
    return lambda x, scale, bias=None: ops.normalize(x, scale, bias, axes, epsilon)


def _rotate(layer: Any) -> Compute:
    if layer.interleaved:
        raise CannotEvaluate(f"interleaved rotation of {layer.name}")
    width = layer.rotary_embedding_dim
    return lambda x, cos, sin, positions=None: ops.rotate(x, cos, sin, positions, width)


def _write_cache(layer: Any) -> Compute:
    _known(layer, "cache_mode", "LINEAR")
    if hasattr(layer, "update_form"):
        _known(layer, "update_form", "PADDED_BHND")
    return ops.write_cache


def _attention(layer: Any) -> Compute:
    """softmax(q·kᵀ + mask)·v: a network's attention has no scale of its own."""
    attention = layer.attention
    _known(attention, "norm_op", "SOFTMAX")
    for form in ("query_form", "key_value_form"):
        if hasattr(attention, form):
            _known(attention, form, "PADDED_BHND")
    if getattr(attention, "normalization_quantize_scale", None) is not None:
        raise CannotEvaluate(f"normalization_quantize_scale of {layer.name}")
    if hasattr(attention, "causal_kind"):
        kind = _known(attention, "causal_kind", "NONE", "UPPER_LEFT", "LOWER_RIGHT")
    else:
        kind = "UPPER_LEFT" if attention.causal else "NONE"

    def compute(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
        queries, keys = query.shape[2], key.shape[2]
        masks = [given for given in (mask,) if given is not None]
        if kind == "UPPER_LEFT":
            masks.append(ops.causal(queries, keys, torch.zeros(1)))
        elif kind == "LOWER_RIGHT":  # LOWER_RIGHT_COUNTS_FROM_LENGTHS
            masks.append(ops.causal(queries, keys, (torch.tensor([keys]) if lengths is None else lengths) - queries))
        if lengths is not None:
            masks.append(ops.shorter(keys, lengths))
        return ops.attend(query, key, value, masks)

    return compute


def _reduce(layer: Any) -> Compute:
    functions: dict[str, Callable[..., Tensor]] = {"SUM": torch.sum, "MAX": torch.amax, "AVG": torch.mean}
    function, axes, keep = functions[_known(layer, "op", *functions)], _bits(layer.axes), layer.keep_dims
    return lambda x: function(ops.wide(x), dim=axes, keepdim=keep)


def _dequantize(layer: Any) -> Compute:
    """(value · scale) of blocks along the first axis, or with one scale for each index of `axis`."""
    if layer.num_inputs != 2:
        raise CannotEvaluate(f"zero points of {layer.name}")
    axis = layer.axis

    def compute(values: Tensor, scales: Tensor) -> Tensor:
        blocks = scales.ndim == values.ndim  # the API does not tell `block_shape`; the shapes do
        return dequantized(values, scales, axis, values.shape[0] // scales.shape[0] if blocks else 0)

    return compute


def _named(attribute: str, table: Mapping[str, Any], meanings: dict[str, str]) -> Callable[[Any], Compute]:
    return lambda layer: table[meanings[_known(layer, attribute, *meanings)]]


_ELEMENTWISE = {
    "SUM": "add", "PROD": "mul", "MAX": "max", "MIN": "min", "SUB": "sub", "DIV": "div", "POW": "pow",
    "FLOOR_DIV": "floor_div", "AND": "and", "OR": "or", "XOR": "xor", "EQUAL": "equal", "GREATER": "greater",
    "LESS": "less",
}  # fmt: skip
_UNARY = {
    "EXP": "exp", "LOG": "log", "SQRT": "sqrt", "RECIP": "reciprocal", "ABS": "abs", "NEG": "neg", "ERF": "erf",
    "NOT": "not", "SIN": "sin", "COS": "cos", "CEIL": "ceil", "FLOOR": "floor",
}  # fmt: skip
_ACTIVATIONS = {
    "RELU": "relu", "SIGMOID": "sigmoid", "TANH": "tanh", "GELU_ERF": "gelu_erf", "GELU_TANH": "gelu_tanh",
}  # fmt: skip
# Those with parameters, as NVIDIA's API documents their α and β.
_PARAMETRIC: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "CLIP": lambda x, alpha, beta: x.clamp(alpha, beta),
    "LEAKY_RELU": lambda x, alpha, _: torch.where(x >= 0, x, alpha * x),
    "ELU": lambda x, alpha, _: torch.where(x >= 0, x, alpha * torch.expm1(x)),
    "HARD_SIGMOID": lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1),
    "SOFTPLUS": lambda x, alpha, beta: alpha * torch.nn.functional.softplus(beta * x),
}


def _activation(layer: Any) -> Compute:
    name = _known(layer, "type", *_ACTIVATIONS, *_PARAMETRIC)
    if name in _ACTIVATIONS:
        return ops.UNARY[_ACTIVATIONS[name]]
    function, alpha, beta = _PARAMETRIC[name], layer.alpha, layer.beta
    return lambda x: function(ops.wide(x), alpha, beta)


def _same(_: Any) -> Compute:
    return lambda x: x


# Layer type → its class in the module, and its meaning.
# Of each layer type: its class, and what makes its meaning.
LAYERS: dict[str, tuple[str, Callable[[Any], Compute]]] = {
    "CONSTANT": ("IConstantLayer", _same),
    "IDENTITY": ("IIdentityLayer", _same),
    "CAST": ("ICastLayer", _same),
    "SHAPE": ("IShapeLayer", lambda _: lambda x: torch.tensor(x.shape)),
    "SHUFFLE": ("IShuffleLayer", _shuffle),
    "SLICE": ("ISliceLayer", _slice),
    "SQUEEZE": ("ISqueezeLayer", lambda _: ops.squeeze),
    "UNSQUEEZE": ("IUnsqueezeLayer", lambda _: ops.unsqueeze),
    "CONCATENATION": ("IConcatenationLayer", lambda layer: lambda *parts, axis=layer.axis: torch.cat(parts, axis)),
    "FILL": ("IFillLayer", _fill),
    "GATHER": ("IGatherLayer", _gather),
    "SELECT": ("ISelectLayer", lambda _: torch.where),
    "ELEMENTWISE": ("IElementWiseLayer", _named("op", ops.BINARY, _ELEMENTWISE)),
    "UNARY": ("IUnaryLayer", _named("op", ops.UNARY, _UNARY)),
    "ACTIVATION": ("IActivationLayer", _activation),
    "MATRIX_MULTIPLY": ("IMatrixMultiplyLayer", _matmul),
    "NORMALIZATION": ("INormalizationLayer", _normalize),
    "SOFTMAX": ("ISoftMaxLayer", lambda layer: partial(ops.softmax, axis=_bits(layer.axes)[0])),
    "REDUCE": ("IReduceLayer", _reduce),
    "ROTARY_EMBEDDING": ("IRotaryEmbeddingLayer", _rotate),
    "DEQUANTIZE": ("IDequantizeLayer", _dequantize),
    "KV_CACHE_UPDATE": ("IKVCacheUpdateLayer", _write_cache),
    "ATTENTION_OUTPUT": ("IAttentionOutputLayer", _attention),
}
