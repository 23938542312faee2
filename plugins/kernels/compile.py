"""Kernels ahead of time, on a machine with no GPU: PTX and cubin, and the assembler's report of each.

Triton makes the PTX; its own bundled `ptxas` makes the cubin of what is left after two changes. Triton appends two
pointers to every kernel's parameters, for scratch memory that these kernels do not use: they are taken away, since
TensorRT passes what the signature says. And the entry is renamed, see `plugins.kernels.shape.symbol`.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from plugins.kernels.merge import merge_attention
from plugins.kernels.shape import DTYPES, AttentionShape, MergeConfig, SplitConfig, check_supported, symbol
from plugins.kernels.split import split_attention

PTX_VERSION = 87  # the oldest that knows sm_120: a driver of CUDA 12.8 takes it
WARP = 32
_HIDDEN = 2  # parameters that Triton appends

_FLOATS, _PARTIALS, _INTEGER = "*{0}", "*fp32", "i32"
_SPLIT_SIGNATURE = {
    **dict.fromkeys(("query", "cos", "sin", "keys", "values"), _FLOATS),
    "lengths": "*i32",
    **dict.fromkeys(("sequence", "capacity"), _INTEGER),
    **dict.fromkeys(("maxima", "sums", "contexts"), _PARTIALS),
}
_MERGE_SIGNATURE = {
    **dict.fromkeys(("maxima", "sums", "contexts"), _PARTIALS),
    "lengths": "*i32",
    **dict.fromkeys(("sequence", "blocks"), _INTEGER),
    "context": _FLOATS,
}


@dataclass(frozen=True)
class Compiled:
    """A kernel for one target.

    Attributes:
        name: of the entry.
        ptx: for drivers of CUDA 12.8 and later; from sm_90 on, for the target alone.
        cubin: for the target alone.
        shared_bytes: dynamic shared memory that the launch must give.
        threads: of a block.
        registers: of a thread.
        spill_stores: bytes that a thread writes for want of registers; spill_loads: reads.
    """

    name: str
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)
    shared_bytes: int
    threads: int
    registers: int
    spill_stores: int
    spill_loads: int


class UnexpectedPtx(Exception):
    """Triton's PTX is not of the form that is changed here; the message says what was expected."""


def compile_split(shape: AttentionShape, dtype: str, config: SplitConfig, sm: int) -> Compiled:
    """SplitAttention's kernel.

    Args:
        shape: of the attention.
        dtype: float16 or bfloat16, of activations and cache.
        config: block sizes.
        sm: the target, 89 for compute capability 8.9.

    Raises:
        UnsupportedByKernels: a shape, type or target that there is no kernel for.
    """
    check_supported(shape, dtype, (sm // 10, sm % 10))
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return _compile(split_attention, _SPLIT_SIGNATURE, shape.split_constants(config), dtype, options, sm)


def compile_merge(shape: AttentionShape, dtype: str, config: MergeConfig, sm: int) -> Compiled:
    """MergeAttention's kernel; arguments and errors as of `compile_split`."""
    check_supported(shape, dtype, (sm // 10, sm % 10))
    options = {"num_warps": config.warps}
    return _compile(merge_attention, _MERGE_SIGNATURE, shape.merge_constants(config), dtype, options, sm)


def _compile(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], dtype: str, options: dict[str, int], sm: int
) -> Compiled:
    types = {name: kind.format(DTYPES[dtype]) for name, kind in signature.items()}
    # TensorRT aligns tensors by 256 bytes; 16 are what the widest load needs.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(
        fn=kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=aligned
    )
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # paths of this machine
        made = triton.compile(
            source,
            target=GPUTarget("cuda", sm, WARP),
            options={**options, "enable_fp_fusion": True, "ptx_version": PTX_VERSION},
        )
    if made.metadata.global_scratch_size or made.metadata.profile_scratch_size:
        raise UnexpectedPtx(f"{made.metadata.name} needs scratch memory, which TensorRT does not give")
    name = symbol(made.metadata.name, types, constants, options)
    ptx = _renamed(_without_hidden(made.asm["ptx"], len(types)), made.metadata.name, name)
    cubin, report = _assemble(ptx, sm)
    registers, stores, loads = (
        int(_found(pattern, report))
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    )
    return Compiled(name, ptx, cubin, made.metadata.shared, made.metadata.num_warps * WARP, registers, stores, loads)


def _without_hidden(ptx: str, parameters: int) -> str:
    """The PTX without what Triton appends to a kernel's parameters."""
    listed = _found(r"\.entry \w+\(\n(.*?)\n\)", ptx)
    declared = listed.split(",\n")
    hidden = [declaration.split()[-1] for declaration in declared[parameters:]]
    if len(hidden) != _HIDDEN:
        raise UnexpectedPtx(f"expected {parameters} parameters and {_HIDDEN} more, found {len(declared)}")
    used = [name for name in hidden if re.search(rf"\[{name}[\]+]", ptx)]
    if used:
        raise UnexpectedPtx(f"{', '.join(used)} should be unused")
    return ptx.replace(listed, ",\n".join(declared[:parameters]), 1)


def _renamed(ptx: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}(?=\(|_param_\d)", new, ptx)


def _assemble(ptx: str, sm: int) -> tuple[bytes, str]:
    """The cubin, and what `ptxas -v` says of it."""
    program = get_ptxas(sm).path
    target = f"sm_{sm}a" if sm >= 90 else f"sm_{sm}"
    with tempfile.TemporaryDirectory() as scratch:
        source, cubin = Path(scratch) / "kernel.ptx", Path(scratch) / "kernel.cubin"
        source.write_text(ptx)
        command = [program, "-v", "--regAllocOptLevel=2", f"--gpu-name={target}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - Triton's own program
        if done.returncode:
            raise UnexpectedPtx(f"ptxas refuses a kernel for {target}: {done.stderr.strip()}")
        return cubin.read_bytes(), done.stderr


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.DOTALL)
    if match is None:
        raise UnexpectedPtx(f"found nothing like {pattern!r} in {text[:200]!r}")
    return match[1]
