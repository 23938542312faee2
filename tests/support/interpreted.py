"""The Triton kernels, run by Triton's interpreter in a process of its own.

TRITON_INTERPRET must be set before Triton's first import, and a process in which it is cannot compile kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import numpy as np
from split_cases import Case

from plugins.kernels.shape import AttentionShape, MergeConfig, SplitConfig
from plugins.split_attention import partial_shapes

Arrays = tuple[np.ndarray, ...]


class Interpreter:
    """Runs kernels on the inputs of cases."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool

    def split(self, case: Case, config: SplitConfig, dtype: str = "float32") -> Arrays:
        """maxima, sums and contexts, NaN where the kernel writes nothing."""
        return self._pool.submit(_split, case, config, dtype).result()

    def merge(self, case: Case, partials: Arrays, config: MergeConfig, dtype: str = "float32") -> np.ndarray:
        """The context, in float32."""
        return self._pool.submit(_merge, case, partials, config, dtype).result()


@contextmanager
def interpreter() -> Iterator[Interpreter]:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=_mend) as pool:
            pool.submit(os.getpid).result()  # the process starts, with the environment as it is now
            if before is None:
                del os.environ["TRITON_INTERPRET"]
            yield Interpreter(pool)
    finally:
        os.environ.pop("TRITON_INTERPRET", None)
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before


def shape_of(case: Case) -> AttentionShape:
    return AttentionShape(case.heads, case.kv_heads, case.head_dim, case.rotary_dim, case.scale)


def _split(case: Case, config: SplitConfig, dtype: str) -> Arrays:
    import torch

    from plugins.kernels.launch import launch_split

    inputs = tuple(_tensor(x, dtype) for x in case.inputs(dtype))
    shapes = partial_shapes(len(case.lengths), case.sequence, case.heads, case.head_dim, case.capacity)
    partials = tuple(torch.full(shape, torch.nan) for shape in shapes)
    launch_split(inputs, partials, shape_of(case), config)
    return tuple(partial.numpy() for partial in partials)


def _merge(case: Case, partials: Arrays, config: MergeConfig, dtype: str) -> np.ndarray:
    import torch

    from plugins.kernels.launch import launch_merge

    context = torch.full(
        (len(case.lengths), case.sequence, case.heads * case.head_dim), torch.nan, dtype=getattr(torch, dtype)
    )
    tensors = tuple(torch.from_numpy(partial) for partial in partials)
    launch_merge(tensors, torch.tensor(case.lengths, dtype=torch.int32), context, shape_of(case), config)
    return context.float().numpy()


def _tensor(x: np.ndarray, dtype: str) -> Any:
    import torch

    if x.dtype == np.int32:
        return torch.from_numpy(x)
    return torch.from_numpy(x.astype(np.float32)).to(getattr(torch, dtype))


def _mend() -> None:
    """Give bfloat16 its meaning: the interpreter holds it as uint16, multiplies those, and truncates conversions."""
    import ml_dtypes
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return TensorHandle(source.data.astype(ml_dtypes.bfloat16).view(np.uint16), tl.bfloat16)
        return cast(self, source, target)

    def exact_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(x.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32) for x in (a, b))
        return dot(self, a, b, *others)

    InterpreterBuilder.cast_impl = rounding_cast
    InterpreterBuilder.create_dot = exact_dot
