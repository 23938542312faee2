"""What the kernels are compiled for: the attention's shape, block sizes, grids, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from plugins.split_attention import GRANULE, blocks_of

TARGETS = (80, 86, 89, 90, 120)  # sm_*
LEAST_CAPABILITY = (8, 0)
DTYPES = {"float16": "fp16", "bfloat16": "bf16"}  # ours to Triton's

# The dynamic shared memory that a kernel may have without its launcher asking for more. That TensorRT asks is written
# nowhere, so no configuration needs it.
SHARED_BYTES = 48 << 10


class UnsupportedByKernels(Exception):
    """A shape, a type or a device that the kernels are not made for; the message names it, and what is."""


@dataclass(frozen=True)
class SplitConfig:
    """Rows (query heads · tokens) and keys of a tile, warps of a program, stages of its pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


@dataclass(frozen=True)
class MergeConfig:
    """Blocks that are merged at once, and warps of a program."""

    at_once: int
    warps: int


# By head_dim. The first two of SplitAttention are for steps of one token, the others for many. How many registers they
# take depends on the group and the assembler, too; for real models none spills on any target, which
# benchmarks/kernel_report.py measures. With four warps in place of eight some would.
SPLIT_CONFIGS: Mapping[int, tuple[SplitConfig, ...]] = {
    64: (
        SplitConfig(16, 64, 4, 2),
        SplitConfig(16, 64, 4, 3),
        SplitConfig(64, 64, 8, 2),
        SplitConfig(128, 64, 8, 2),
    ),
    96: (
        SplitConfig(16, 64, 8, 2),
        SplitConfig(16, 32, 4, 3),
        SplitConfig(32, 32, 4, 2),
        SplitConfig(64, 32, 8, 2),
    ),
    128: (
        SplitConfig(16, 64, 4, 2),
        SplitConfig(16, 32, 4, 3),
        SplitConfig(32, 64, 8, 2),
        SplitConfig(64, 32, 8, 2),
    ),
    192: (
        SplitConfig(16, 32, 4, 2),
        SplitConfig(16, 32, 8, 2),
        SplitConfig(32, 32, 8, 2),
    ),
}
MERGE_CONFIGS = (MergeConfig(4, 1), MergeConfig(16, 4))


@dataclass(frozen=True)
class AttentionShape:
    """What a graph fixes of its attentions; the attributes of SplitAttention."""

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    scale: float

    @property
    def group(self) -> int:
        """Query heads that share a key/value head."""
        return self.heads // self.kv_heads

    @property
    def pieces(self) -> tuple[int, int]:
        """The greatest power of two in head_dim, and what it leaves: 0, or a power of two."""
        width = 1 << (self.head_dim.bit_length() - 1)
        return width, self.head_dim - width

    def split_constants(self, config: SplitConfig) -> dict[str, Any]:
        """What is compiled into SplitAttention's kernel, by parameter."""
        width, rest = self.pieces
        return {
            "KV_HEADS": self.kv_heads,
            "GROUP": self.group,
            "WIDTH": width,
            "REST": rest,
            "ROTARY_DIM": self.rotary_dim,
            "SCALE": self.scale,
            "GRANULE": GRANULE,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }

    def merge_constants(self, config: MergeConfig) -> dict[str, Any]:
        """What is compiled into MergeAttention's kernel, by parameter."""
        width, rest = self.pieces
        return {
            "HEADS": self.heads,
            "HEAD_DIM": self.head_dim,
            "GRANULE": GRANULE,
            "CHANNELS": 2 * width if rest else width,
            "AT_ONCE": config.at_once,
        }

    def split_grid(self, batch: int, sequence: int, capacity: int, config: SplitConfig) -> tuple[int, int, int]:
        """Programs of SplitAttention's kernel in x, y and z."""
        tiles = -(-sequence * self.group // config.block_m)
        return tiles * self.kv_heads, blocks_of(sequence, capacity), batch

    def merge_grid(self, batch: int, sequence: int) -> tuple[int, int, int]:
        """Programs of MergeAttention's kernel in x, y and z."""
        return sequence * self.heads, batch, 1


def check_supported(shape: AttentionShape, dtype: str, capability: tuple[int, int] | None = None) -> None:
    """Refuse what the kernels are not compiled for.

    Args:
        shape: of the graph's attentions.
        dtype: of activations and cache, numpy's name.
        capability: the GPU's, where it is known.

    Raises:
        UnsupportedByKernels: what it is, and what is supported.
    """
    if dtype not in DTYPES:
        raise UnsupportedByKernels(f"attention in {dtype} has no kernel; there are kernels for {_listed(DTYPES)}")
    if shape.head_dim not in SPLIT_CONFIGS:
        raise UnsupportedByKernels(
            f"head_dim {shape.head_dim} has no attention kernel; there are kernels for {_listed(SPLIT_CONFIGS)}"
        )
    if shape.rotary_dim % 2 or not 2 <= shape.rotary_dim <= shape.head_dim:
        raise UnsupportedByKernels(
            f"rotary_dim {shape.rotary_dim} has no attention kernel; it must be even and at most {shape.head_dim}"
        )
    if shape.heads % shape.kv_heads:
        raise UnsupportedByKernels(
            f"{shape.heads} heads over {shape.kv_heads} key/value heads have no attention kernel; they must divide"
        )
    if capability is not None and capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, each)) for each in (capability, LEAST_CAPABILITY))
        raise UnsupportedByKernels(f"compute capability {found} is below {least}, the least of the attention kernels")


def symbol(kernel: str, *of: object) -> str:
    """A kernel's name in an engine: its own for each set of constants, since TensorRT tells kernels apart by name."""
    return f"nemotron_{kernel}_{hashlib.sha256(repr(of).encode()).hexdigest()[:16]}"


def _listed(names: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, names))
