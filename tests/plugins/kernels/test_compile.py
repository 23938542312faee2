"""Kernels compile ahead of time for every target, with no GPU, into what TensorRT can launch; the rest is refused."""

from __future__ import annotations

import re
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import pytest

from plugins.kernels.shape import (
    DTYPES,
    MERGE_CONFIGS,
    SHARED_BYTES,
    SPLIT_CONFIGS,
    TARGETS,
    AttentionShape,
    MergeConfig,
    SplitConfig,
    UnsupportedByKernels,
    check_supported,
)

MINITRON_4B = AttentionShape(heads=24, kv_heads=8, head_dim=128, rotary_dim=64, scale=128**-0.5)
POINTER, INTEGER = ".u64", ".u32"


def parameters(ptx: str) -> list[str]:
    declared = re.search(r"\.entry \w+\((.*?)\)", ptx, re.DOTALL)
    assert declared
    return re.findall(r"\.param (\.\w+)", declared[1])


def compiled(shape: AttentionShape, dtype: str, config: SplitConfig | MergeConfig, sm: int) -> tuple[int, int, int]:
    """Registers, bytes spilled, shared memory."""
    from plugins.kernels.compile import compile_merge, compile_split

    made = (compile_split if isinstance(config, SplitConfig) else compile_merge)(shape, dtype, config, sm)
    return made.registers, made.spill_stores + made.spill_loads, made.shared_bytes


@pytest.mark.parametrize("sm", TARGETS)
def test_split_attention_compiles_into_what_tensorrt_launches(sm: int) -> None:
    from plugins.kernels.compile import compile_split

    made = compile_split(MINITRON_4B, "float16", SPLIT_CONFIGS[128][0], sm)
    assert made.cubin.startswith(b"\x7fELF")
    assert made.name.encode() in made.cubin
    assert re.search(rf"\.target sm_{sm}a?\n", made.ptx)
    assert f".entry {made.name}(" in made.ptx
    # inputs, extra arguments, outputs, and nothing that Triton appends
    assert parameters(made.ptx) == [POINTER] * 6 + [INTEGER] * 2 + [POINTER] * 3
    assert made.spill_stores == made.spill_loads == 0
    assert 0 < made.shared_bytes <= SHARED_BYTES
    assert ".file" not in made.ptx  # the paths of the machine that compiled


def test_merge_attention_compiles_into_what_tensorrt_launches() -> None:
    from plugins.kernels.compile import compile_merge

    made = compile_merge(MINITRON_4B, "bfloat16", MERGE_CONFIGS[0], 90)
    assert parameters(made.ptx) == [POINTER] * 4 + [INTEGER] * 2 + [POINTER]
    assert made.threads == 32 * MERGE_CONFIGS[0].warps


def test_kernels_that_differ_have_names_that_differ() -> None:
    """TensorRT tells kernels apart by name: two tactics of one name would be one kernel with two launches."""
    from plugins.kernels.compile import compile_merge

    names = {compile_merge(MINITRON_4B, *each, 80).name for each in product(DTYPES, MERGE_CONFIGS)}
    assert len(names) == len(DTYPES) * len(MERGE_CONFIGS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("width", SPLIT_CONFIGS)
def test_every_kernel_compiles_for_every_target_without_a_spill(width: int) -> None:
    shape = AttentionShape(heads=12, kv_heads=4, head_dim=width, rotary_dim=width // 2, scale=width**-0.5)
    wanted = list(product((shape,), DTYPES, (*SPLIT_CONFIGS[width], *MERGE_CONFIGS), TARGETS))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = dict(zip(wanted, pool.map(compiled, *zip(*wanted, strict=True)), strict=True))
    assert {key: value for key, value in found.items() if value[1] or value[2] > SHARED_BYTES} == {}


@pytest.mark.parametrize(
    ("changes", "dtype", "capability", "told"),
    [
        ({"head_dim": 80}, "float16", None, "head_dim 80 has no attention kernel; there are kernels for 64, 96, 128"),
        ({"rotary_dim": 160}, "float16", None, "rotary_dim 160 .* at most 128"),
        ({"rotary_dim": 33}, "float16", None, "rotary_dim 33 .* must be even"),
        ({"kv_heads": 7}, "float16", None, "24 heads over 7 key/value heads"),
        ({}, "float32", None, "float32 has no kernel; there are kernels for float16, bfloat16"),
        ({}, "bfloat16", (7, 5), "compute capability 7.5 is below 8.0"),
    ],
)
def test_what_has_no_kernel_is_refused_by_name(
    changes: dict[str, int], dtype: str, capability: tuple[int, int] | None, told: str
) -> None:
    sizes = {"heads": 24, "kv_heads": 8, "head_dim": 128, "rotary_dim": 64} | changes
    with pytest.raises(UnsupportedByKernels, match=told):
        check_supported(AttentionShape(**sizes, scale=1.0), dtype, capability)
    check_supported(MINITRON_4B, "float16", (8, 0))
