"""The two ops of the attention kernels, by their reference in numpy: `plugins.split_reference`."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from exporter.evaluate.onnx_attributes import Attributes
from exporter.evaluate.program import Compute
from plugins.split_attention import blocks_of
from plugins.split_reference import merge_attention, seen_blocks, split_attention

Tensor = torch.Tensor
Tensors = tuple[torch.Tensor, ...]
_DTYPES = {torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16, torch.float32: np.float32}
_FOR_TENSORRT = ("plugin_namespace", "plugin_version", "aot")  # where its kernel is found, not what it means


def split(a: Attributes) -> Compute:
    """`nemotron::SplitAttention`: what its blocks of keys give, and 0 where that is undefined."""
    heads, kv_heads, scale = a.get("heads"), a.get("kv_heads"), a.get("scale")
    for name in ("head_dim", "rotary_dim", *_FOR_TENSORRT):
        a.get(name)

    def compute(query: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensors:
        q, c, s, k, v = map(_array, (query, cos, sin, keys, values))
        told = lengths.numpy()
        with np.errstate(all="ignore"):  # what is not finite is named by its edge
            partials = split_attention(q, c, s, k, v, told, heads=heads, kv_heads=kv_heads, scale=scale)
        seen = seen_blocks(told, query.shape[1], blocks_of(query.shape[1], keys.shape[2]))[:, None]
        defined = (seen, seen, seen[..., None])
        finite = (np.where(where, each, np.float32(0)) for where, each in zip(defined, partials, strict=True))
        return tuple(map(torch.from_numpy, finite))

    return compute


def merge(a: Attributes) -> Compute:
    """`nemotron::MergeAttention`; `to` is the edge's dtype."""
    for name in ("to", *_FOR_TENSORRT):
        a.get(name)

    def compute(maxima: Tensor, sums: Tensor, contexts: Tensor, lengths: Tensor) -> Tensor:
        with np.errstate(all="ignore"):
            return torch.from_numpy(merge_attention(maxima.numpy(), sums.numpy(), contexts.numpy(), lengths.numpy()))

    return compute


def _array(x: Tensor) -> NDArray[np.floating]:
    """The same numbers in the same type; numpy's bfloat16 is ml_dtypes'."""
    return x.float().numpy().astype(_DTYPES[x.dtype])
