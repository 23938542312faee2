"""What the operations mean, on torch tensors: floats are computed in fp32 whatever they are stored in.

Results are not rounded: the edge they go to says to which dtype. Nothing here knows ONNX or TensorRT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Tensor = torch.Tensor


def wide(x: Tensor) -> Tensor:
    """Floats in fp32; integers and booleans as they are."""
    return x.float() if x.is_floating_point() else x


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Integers are divided towards zero."""
    return wide(a) / wide(b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _both(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: function(wide(a), wide(b))


def _one(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(wide(x))


BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": _both(torch.add),
    "sub": _both(torch.sub),
    "mul": _both(torch.mul),
    "div": divide,
    "floor_div": _both(torch.floor_divide),
    "pow": _both(torch.pow),
    "max": _both(torch.maximum),
    "min": _both(torch.minimum),
    "equal": torch.eq,
    "less": torch.lt,
    "greater": torch.gt,
    "less_or_equal": torch.le,
    "greater_or_equal": torch.ge,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "xor": torch.logical_xor,
    "matmul": _both(torch.matmul),
}

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": _one(torch.relu),
    "sigmoid": _one(torch.sigmoid),
    "tanh": _one(torch.tanh),
    "erf": _one(torch.erf),
    "exp": _one(torch.exp),
    "log": _one(torch.log),
    "sqrt": _one(torch.sqrt),
    "reciprocal": _one(torch.reciprocal),
    "neg": _one(torch.neg),
    "abs": _one(torch.abs),
    "floor": _one(torch.floor),
    "ceil": _one(torch.ceil),
    "sin": _one(torch.sin),
    "cos": _one(torch.cos),
    "not": torch.logical_not,
    "softplus": _one(torch.nn.functional.softplus),
    "mish": _one(torch.nn.functional.mish),
    "hard_swish": _one(torch.nn.functional.hardswish),
    "gelu_erf": _one(torch.nn.functional.gelu),
    "gelu_tanh": _one(lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
}


def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Without these dimensions of 1 (default: all of them)."""
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    """New dimensions of 1 at these places of the result."""
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in axes.tolist()):
        x = x.unsqueeze(axis)
    return x


def softmax(x: Tensor, axis: int) -> Tensor:
    """In fp32."""
    return wide(x).softmax(axis)


def normalize(x: Tensor, scale: Tensor, bias: Tensor | None, axes: Sequence[int], epsilon: float) -> Tensor:
    """LayerNorm over the axes, in fp32: (x − mean) / √(variance + ε) · scale + bias."""
    x = wide(x)
    centred = x - x.mean(tuple(axes), keepdim=True)
    normed = centred / torch.sqrt(centred.square().mean(tuple(axes), keepdim=True) + epsilon)
    return normed * wide(scale) + (0 if bias is None else wide(bias))


def gather(data: Tensor, indices: Tensor, axis: int) -> Tensor:
    """data[…, indices, …] at one axis; negative indices count from the end, others outside are an IndexError."""
    axis %= data.ndim
    flat = indices.long().reshape(-1)
    chosen = data.index_select(axis, torch.where(flat < 0, flat + data.shape[axis], flat))
    return chosen.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])


def gather_nd(data: Tensor, indices: Tensor, batch_dims: int) -> Tensor:
    """Each index vector, the last dimension, picks a slice of data behind the batch dimensions."""
    if batch_dims not in {0, 1}:
        raise ValueError(f"batch_dims should be 0 or 1, not {batch_dims}")
    vectors = indices.long().unbind(-1)
    if batch_dims:
        row = torch.arange(len(data)).reshape(-1, *[1] * (indices.ndim - 2))
        vectors = (row.expand(vectors[0].shape), *vectors)
    return data[vectors]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, width: int) -> Tensor:
    """Rotate the first `width` channels of each head by position (0: all), the pairs half a width apart.

    Args:
        x: [batch, heads, sequence, head_dim].
        cos: [max_position, width/2], or [batch, sequence, width/2] without positions; sin likewise.
        positions: [batch, sequence].
        width: an even number of channels.
    """
    half = (width or x.shape[-1]) // 2
    if positions is not None:
        cos, sin = cos[positions.long()], sin[positions.long()]
    c, s = wide(cos)[:, None, :, :half], wide(sin)[:, None, :, :half]
    x = wide(x)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * c - second * s, second * c + first * s, rest], -1)


def write_cache(past: Tensor, update: Tensor, starts: Tensor) -> Tensor:
    """The cache [batch, kv_heads, capacity, head_dim] with each row's update written from its start on.

    What would pass the capacity is dropped without a word, as TensorRT does: sessions refuse such steps.
    """
    present = past.clone()
    positions = starts.long()[:, None] + torch.arange(update.shape[2])
    row, column = (positions < past.shape[2]).nonzero(as_tuple=True)
    present[row, :, positions[row, column]] = update[row, :, column]
    return present


def causal(queries: int, keys: int, offset: Tensor) -> Tensor:
    """Query i sees key j where j ≤ i + offset; offset [batch] or [1] gives bool [batch, 1, queries, keys]."""
    last = torch.arange(queries) + offset.long()[:, None]
    return torch.arange(keys) <= last[:, None, :, None]


def shorter(keys: int, lengths: Tensor) -> Tensor:
    """Keys before each row's length: bool [batch, 1, 1, keys]."""
    return (torch.arange(keys) < lengths.long()[:, None])[:, None, None]


def attend(query: Tensor, key: Tensor, value: Tensor, masks: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Grouped-query attention: q·kᵀ accumulated and softmax taken in fp32.

    The weights are rounded to the value's dtype before they meet it, as in fused kernels, whose matrix units take
    16-bit operands, and in transformers' eager attention. A query that sees no key has no meaning and gives NaN.

    Args:
        query: [batch, heads, queries, head_dim].
        key, value: [batch, kv_heads, keys, head_dim].
        masks: each broadcasts to [batch, heads, queries, keys]; booleans are True where a key is seen, floats are
            added to the scores.
        scale: of the scores, in fp32.
    """
    batch, heads, queries, width = query.shape
    kv_heads = key.shape[1]
    grouped = wide(query).reshape(batch, kv_heads, -1, width)
    scores = (grouped @ wide(key).mT).reshape(batch, heads, queries, -1) * scale
    for mask in masks:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + wide(mask)
    weights = wide(scores.softmax(-1).to(value.dtype)).reshape(batch, kv_heads, -1, key.shape[2])
    return (weights @ wide(value)).reshape(batch, heads, queries, -1)
