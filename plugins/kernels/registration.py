"""Both kernels as ahead-of-time plugins of TensorRT, through `tensorrt.plugin` (NVIDIA/TensorRT, python/packaging).

TensorRT calls what is registered here while it builds, and only then: it asks for the shapes of outputs, for types and
block sizes to time, and for the PTX, the grid and the extra arguments of each, which stay in the engine.

Plugins of one attention shape are a namespace of their own, and have no attributes: what a graph's attributes say is
known here, TensorRT's parser gives a plugin only what it declares, and `tensorrt.plugin` of TensorRT 11.0 turns an
array of one element into a number, which NumPy has refused since 2.4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from plugins.kernels.compile import Compiled, compile_merge, compile_split
from plugins.kernels.shape import MERGE_CONFIGS, SPLIT_CONFIGS, AttentionShape, MergeConfig, SplitConfig
from plugins.split_attention import GRANULE, MERGE_ATTENTION, MOST_BLOCKS, SPLIT_ATTENTION

VERSION = "1"  # what tensorrt.plugin gives every plugin
_TYPES = {"float16": ("HALF", "FP16"), "bfloat16": ("BF16", "BF16")}  # members of DataType, names in a combination
_PARTIALS = ("FP32", "FP32", "FP32")
_SPLIT_INPUTS = ("query", "cos", "sin", "key_cache", "value_cache", "lengths")
_MERGE_INPUTS = ("maxima", "sums", "contexts", "lengths")


@cache
def register(trt: Any, trtp: Any, shape: AttentionShape, dtype: str, sm: int) -> str:
    """Compile and register SplitAttention and MergeAttention of one attention shape, once in a process.

    Whatever is wrong with a kernel shows here, and not in a callback of TensorRT's.

    Args:
        trt: TensorRT's module.
        trtp: its module `tensorrt.plugin`.
        shape: of the graph's attentions.
        dtype: float16 or bfloat16, of activations and cache.
        sm: what kernels are compiled for, 89 for compute capability 8.9.

    Raises:
        UnexpectedPtx: Triton makes something else of a kernel than TensorRT can launch.

    Returns:
        The namespace in which TensorRT finds them: the graph's nodes name it in `plugin_namespace`.
    """
    split = {config: compile_split(shape, dtype, config, sm) for config in SPLIT_CONFIGS[shape.head_dim]}
    merge = {config: compile_merge(shape, dtype, config, sm) for config in MERGE_CONFIGS}
    code = [kernel.ptx for kernel in (*split.values(), *merge.values())]  # or a timing cache would keep old ones' times
    digest = hashlib.sha256(repr((shape, dtype, sm, code)).encode()).hexdigest()[:16]
    namespace = f"nemotron_{digest}"
    _register_split(trt, trtp, f"{namespace}::{SPLIT_ATTENTION}", shape, dtype, split)
    _register_merge(trt, trtp, f"{namespace}::{MERGE_ATTENTION}", shape, dtype, merge)
    return namespace


def _register_split(
    trt: Any, trtp: Any, name: str, shape: AttentionShape, dtype: str, compiled: Mapping[SplitConfig, Compiled]
) -> None:
    configs = tuple(compiled)
    half = _TYPES[dtype][1]

    def describe(query: Any, cos: Any, sin: Any, key_cache: Any, value_cache: Any, lengths: Any) -> Any:
        batch, sequence, _ = query.shape_expr
        rows = (batch, _heads(query, key_cache), sequence, _blocks(trtp, query, key_cache))
        shapes = (rows, rows, (*rows, key_cache.shape_expr[3]))
        return tuple(trtp.from_shape_expr(each, trt.DataType.FLOAT) for each in shapes)

    def autotune(query: Any, cos: Any, sin: Any, key_cache: Any, value_cache: Any, lengths: Any, outputs: Any) -> Any:
        types = (half, half, half, half, half, "INT32", *_PARTIALS)
        tactics = tactics_of(configs, shape.group * _sequence(query.shape))
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR", tactics)]

    def kernel(
        query: Any, cos: Any, sin: Any, key_cache: Any, value_cache: Any, lengths: Any, outputs: Any, tactic: int
    ) -> Any:
        config: SplitConfig = _chosen(configs, tactic)
        sequence, capacity = query.shape_expr[1], key_cache.shape_expr[2]
        tiles = trtp.cdiv(sequence * shape.group, config.block_m)
        grid = (tiles * shape.kv_heads, _blocks(trtp, query, key_cache), query.shape_expr[0])
        return _launch(trtp, compiled[config], grid, (sequence, capacity))

    _decorate(trtp, name, _SPLIT_INPUTS, 3, (describe, autotune, kernel))


def _register_merge(
    trt: Any, trtp: Any, name: str, shape: AttentionShape, dtype: str, compiled: Mapping[MergeConfig, Compiled]
) -> None:
    configs = tuple(compiled)
    member, half = _TYPES[dtype]

    def describe(maxima: Any, sums: Any, contexts: Any, lengths: Any) -> Any:
        batch, heads, sequence, _, width = contexts.shape_expr
        return trtp.from_shape_expr((batch, sequence, heads * width), getattr(trt.DataType, member))

    def autotune(maxima: Any, sums: Any, contexts: Any, lengths: Any, outputs: Any) -> Any:
        tactics = list(range(1, len(configs) + 1))
        return [trtp.AutoTuneCombination(", ".join((*_PARTIALS, "INT32", half)), "LINEAR", tactics)]

    def kernel(maxima: Any, sums: Any, contexts: Any, lengths: Any, outputs: Any, tactic: int) -> Any:
        config: MergeConfig = _chosen(configs, tactic)
        batch, _, sequence, blocks = maxima.shape_expr
        return _launch(trtp, compiled[config], (sequence * shape.heads, batch, 1), (sequence, blocks))

    _decorate(trtp, name, _MERGE_INPUTS, 1, (describe, autotune, kernel))


def tactics_of(configs: Sequence[SplitConfig], rows: int) -> list[int]:
    """The numbers, from 1 on, of the configurations that TensorRT should time for a tile of so many rows.

    TensorRT times kernels on lengths of its own making. Where they are short, a step of one token costs nothing with
    any of them, and the time would choose by chance: it has the smallest tiles alone. Many tokens are work whatever the
    lengths say.
    """
    least = min(config.block_m for config in configs)
    return [number for number, config in enumerate(configs, 1) if rows > least or config.block_m == least]


def _chosen(configs: Sequence[Any], tactic: int) -> Any:
    """The configuration of a tactic; 0 is TensorRT's own before it has chosen one."""
    return configs[max(tactic, 1) - 1]


def _heads(query: Any, key_cache: Any) -> Any:
    return query.shape_expr[2] // key_cache.shape_expr[3]


def _blocks(trtp: Any, query: Any, key_cache: Any) -> Any:
    """`plugins.split_attention.blocks_of`, of symbols."""
    sequence, capacity = query.shape_expr[1], key_cache.shape_expr[2]
    for_sequence = trtp.ShapeExpr(MOST_BLOCKS) // sequence
    return trtp.max(trtp.min(trtp.cdiv(capacity, GRANULE), for_sequence), 1)


def _sequence(shape: Any) -> int:
    """The tokens of a row in the step that is timed."""
    return int((shape.opt if shape.is_dynamic else tuple(shape))[1])


def _launch(trtp: Any, kernel: Compiled, grid: Sequence[Any], extra: Sequence[Any]) -> tuple[str, str, Any, Any]:
    params = trtp.KernelLaunchParams()
    params.grid_x, params.grid_y, params.grid_z = grid
    params.block_x, params.shared_mem = kernel.threads, kernel.shared_bytes
    arguments = trtp.SymIntExprs(len(extra))
    for index, value in enumerate(extra):
        arguments[index] = trtp.SymInt32(value)
    return kernel.name, kernel.ptx, params, arguments


def _decorate(
    trtp: Any, name: str, inputs: Sequence[str], outputs: int, functions: tuple[Callable[..., Any], ...]
) -> None:
    """Hand the three functions over, with the annotations that `tensorrt.plugin` reads: classes, not their names."""
    describe, autotune, kernel = functions
    tensors = dict.fromkeys(inputs, trtp.TensorDesc)
    described = tuple[(trtp.TensorDesc,) * outputs] if outputs > 1 else trtp.TensorDesc  # type: ignore[misc]
    listed = {"outputs": tuple[trtp.TensorDesc]}
    combinations = list[trtp.AutoTuneCombination]
    launched = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    describe.__annotations__ = {**tensors, "return": described}
    autotune.__annotations__ = {**tensors, **listed, "return": combinations}
    kernel.__annotations__ = {**tensors, **listed, "tactic": int, "return": launched}
    trtp.register(name)(describe)
    trtp.autotune(name)(autotune)
    trtp.aot_impl(name)(kernel)
