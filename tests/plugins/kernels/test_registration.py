"""The kernels as plugins of TensorRT, against a small fake of `tensorrt.plugin`: tests/foreign has NVIDIA's own."""

from __future__ import annotations

import re
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from fake_tensorrt_plugin import Built, DataType, FakeTensorRTPlugin

from plugins.kernels.shape import MERGE_CONFIGS, SPLIT_CONFIGS, AttentionShape, MergeConfig, SplitConfig
from plugins.split_attention import blocks_of, partial_shapes

pytest.importorskip("triton", reason="needs Triton (pip install 'nemotron-export[kernels]')")

SHAPE = AttentionShape(heads=24, kv_heads=8, head_dim=128, rotary_dim=64, scale=128**-0.5)
TRT: Any = ModuleType("tensorrt")
TRT.DataType = DataType
HALVES = {"float16": DataType.HALF, "bfloat16": DataType.BF16}
CAPACITY, POSITIONS = 1000, 4096
SPLIT_INPUTS: list[list[int | str]] = [
    ["batch", "sequence", 24 * 128],
    [POSITIONS, 32],
    [POSITIONS, 32],
    ["batch", 8, CAPACITY, 128],
    ["batch", 8, CAPACITY, 128],
    ["batch"],
]
MERGE_INPUTS: list[list[int | str]] = [
    ["batch", 24, "sequence", "blocks"],
    ["batch", 24, "sequence", "blocks"],
    ["batch", 24, "sequence", "blocks", 128],
    ["batch"],
]
STEPS = [(1, 1), (3, 1), (2, 5), (1, 64), (1, 700)]


def code_of(config: SplitConfig | MergeConfig) -> SimpleNamespace:
    """What stands for a compiled kernel."""
    return SimpleNamespace(name=repr(config), ptx="ptx", threads=32 * config.warps, shared_bytes=4096)


@pytest.fixture
def trtp(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRTPlugin:
    """The module, and kernels that are not compiled."""
    for name in ("compile_split", "compile_merge"):
        monkeypatch.setattr(f"plugins.kernels.registration.{name}", lambda shape, dtype, config, sm: code_of(config))
    return FakeTensorRTPlugin()


def split(trtp: Any, dtype: str = "float16", best: int = 700, times: int = 1) -> Built:
    from plugins.kernels.registration import register

    namespace = register(TRT, trtp, SHAPE, dtype, 89)
    dtypes = [HALVES[dtype]] * 5 + [DataType.INT32]
    sizes = {"batch": 1, "sequence": best}
    for _ in range(times):  # a plugin is asked once for each layer
        built = trtp.build(f"{namespace}::SplitAttention", SPLIT_INPUTS, dtypes, sizes)
    return built


def merge(trtp: Any, dtype: str = "float16") -> Built:
    from plugins.kernels.registration import register

    namespace = register(TRT, trtp, SHAPE, dtype, 89)
    dtypes = [DataType.FLOAT] * 3 + [DataType.INT32]
    return trtp.build(f"{namespace}::MergeAttention", MERGE_INPUTS, dtypes, {"batch": 1, "sequence": 700, "blocks": 1})


@pytest.mark.parametrize("dtype", HALVES)
def test_outputs_are_what_the_ops_say(trtp: FakeTensorRTPlugin, dtype: str) -> None:
    parts, context = split(trtp, dtype, times=2), merge(trtp, dtype)
    assert parts.dtypes == [DataType.FLOAT] * 3
    assert context.dtypes == [HALVES[dtype]]
    for batch, sequence in STEPS:
        sizes = {"batch": batch, "sequence": sequence, "blocks": blocks_of(sequence, CAPACITY)}
        found = tuple(tuple(dim.at(sizes) for dim in dims) for dims in parts.shapes)
        assert found == partial_shapes(batch, sequence, SHAPE.heads, SHAPE.head_dim, CAPACITY)
        assert [dim.at(sizes) for dim in context.shapes[0]] == [batch, sequence, SHAPE.heads * SHAPE.head_dim]


def test_every_block_size_is_launched_as_the_kernel_needs_it(trtp: FakeTensorRTPlugin) -> None:
    parts, context = split(trtp), merge(trtp)
    assert list(parts.launches) == list(range(1, len(SPLIT_CONFIGS[128]) + 1))
    assert list(context.launches) == list(range(1, len(MERGE_CONFIGS) + 1))
    for batch, sequence in STEPS:
        sizes = {"batch": batch, "sequence": sequence, "blocks": blocks_of(sequence, CAPACITY)}
        for config, launch in zip(SPLIT_CONFIGS[128], parts.launches.values(), strict=True):
            expected = (*SHAPE.split_grid(batch, sequence, CAPACITY, config), 32 * config.warps, 1, 1, 4096)
            assert launch.name == repr(config)
            assert tuple(each.at(sizes) for each in launch.params.values()) == expected
            assert [each.at(sizes) for each in launch.extra] == [sequence, CAPACITY]
        for merging, launch in zip(MERGE_CONFIGS, context.launches.values(), strict=True):
            grid = (*SHAPE.merge_grid(batch, sequence), 32 * merging.warps, 1, 1, 4096)
            assert launch.name == repr(merging)
            assert tuple(each.at(sizes) for each in launch.params.values()) == grid
            assert [each.at(sizes) for each in launch.extra] == [sequence, sizes["blocks"]]


def test_a_step_of_one_token_is_timed_with_small_tiles_alone(trtp: FakeTensorRTPlugin) -> None:
    """Its time says nothing where TensorRT's lengths are short, and a large tile would waste most of its rows."""
    chosen = [SPLIT_CONFIGS[128][tactic - 1].block_m for tactic in split(trtp, best=1).launches]
    assert set(chosen) == {16}
    assert len(chosen) == 2


def test_a_shape_is_registered_once_in_a_process(trtp: FakeTensorRTPlugin) -> None:
    from dataclasses import replace

    from plugins.kernels.registration import register

    shapes = [SHAPE, SHAPE, replace(SHAPE, scale=1.0)]
    one, again, other = (register(TRT, trtp, shape, "float16", 89) for shape in shapes)
    assert one == again != other
    assert sorted(trtp.plugins) == sorted(
        f"{space}::{op}Attention" for space in (one, other) for op in ("Split", "Merge")
    )


def test_the_engine_is_given_ptx_whose_parameters_are_in_tensorrts_order() -> None:
    """With a kernel that is really compiled: inputs, extra arguments, outputs."""
    from plugins.kernels.registration import register

    trtp = FakeTensorRTPlugin()
    namespace = register(TRT, trtp, SHAPE, "bfloat16", 120)
    dtypes = [DataType.FLOAT] * 3 + [DataType.INT32]
    sizes = {"batch": 1, "sequence": 1, "blocks": 16}
    built = trtp.build(f"{namespace}::MergeAttention", MERGE_INPUTS, dtypes, sizes)
    for launch in built.launches.values():
        assert isinstance(launch.code, str)
        declared = re.search(rf"\.entry {launch.name}\((.*?)\)", launch.code, re.DOTALL)
        assert declared
        assert re.findall(r"\.param \.(u\d+)", declared[1]) == ["u64"] * 4 + ["u32"] * 2 + ["u64"]
        assert ".target sm_120" in launch.code
        assert launch.params["shared_mem"].at(sizes) <= 48 << 10


def test_kernels_of_another_release_are_other_plugins(
    trtp: FakeTensorRTPlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a timing cache chooses block sizes by what the former kernels took."""
    from plugins.kernels.registration import register

    before = register(TRT, trtp, SHAPE, "float16", 89)
    monkeypatch.setattr(
        "plugins.kernels.registration.compile_split",
        lambda shape, dtype, config, sm: SimpleNamespace(**vars(code_of(config)) | {"ptx": "changed"}),
    )
    assert register(TRT, FakeTensorRTPlugin(), SHAPE, "float16", 89) != before
