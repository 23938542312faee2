"""Both kernels over tensors: on a GPU, or on a CPU where TRITON_INTERPRET=1 was set before Triton's first import.

Tensors are torch's; only their shapes are read here, and Triton takes their addresses.
"""

from __future__ import annotations

from typing import Any

from plugins.kernels.merge import merge_attention
from plugins.kernels.shape import AttentionShape, MergeConfig, SplitConfig
from plugins.kernels.split import split_attention


def launch_split(
    inputs: tuple[Any, ...], partials: tuple[Any, ...], shape: AttentionShape, config: SplitConfig
) -> None:
    """Write `partials` (maxima, sums, contexts), contiguous as `plugins.split_attention` shapes them.

    Args:
        inputs: query, cos, sin, key_cache, value_cache, lengths, contiguous.
        partials: where the outputs go; what is undefined stays as it is.
        shape: of the attention.
        config: of the kernel.
    """
    query, _, _, key_cache, *_ = inputs
    batch, sequence, _ = query.shape
    capacity = key_cache.shape[2]
    split_attention[shape.split_grid(batch, sequence, capacity, config)](
        *inputs,
        sequence,
        capacity,
        *partials,
        **shape.split_constants(config),
        num_warps=config.warps,
        num_stages=config.stages,
    )


def launch_merge(
    partials: tuple[Any, ...], lengths: Any, context: Any, shape: AttentionShape, config: MergeConfig
) -> None:
    """Write `context` [batch, sequence, heads·head_dim] from what `launch_split` has written."""
    batch, sequence, _ = context.shape
    blocks = partials[0].shape[3]
    merge_attention[shape.merge_grid(batch, sequence)](
        *partials, lengths, sequence, blocks, context, **shape.merge_constants(config), num_warps=config.warps
    )
