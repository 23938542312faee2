"""The kernels registered with TensorRT's own Python: its `tensorrt.plugin`, its creators, its plugins and their types.

Its C++ is not there; `tests/support/tensorrt_builder.py` asks what it would.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorrt_python import ask_plugins

from plugins.kernels.shape import MERGE_CONFIGS, SPLIT_CONFIGS, AttentionShape
from plugins.split_attention import blocks_of, partial_shapes

pytest.importorskip("triton", reason="needs Triton (pip install 'nemotron-export[kernels]')")
pytestmark = pytest.mark.foreign

VERSIONS = ["11.0.0.114", "11.4.0.106"]  # the oldest that pyproject.toml takes, and one of today
DTYPES = {"fp16": ("HALF", "float16"), "bf16": ("BF16", "bfloat16")}  # by a bundle's precision
LAYERS = 4
STEPS = [(1, 1, 512), (3, 1, 512), (2, 5, 1000), (1, 64, 4096), (1, 700, 131072), (4, 33, 64)]
FIXED = (2, 1, 640)
PROFILES = {
    "prefill": {"batch": [1, 1, 4], "sequence": [1, 256, 1024], "capacity": [64, 512, 131072]},
    "decode": {"batch": [1, 1, 4], "sequence": [1, 1, 1], "capacity": [64, 512, 131072]},
    "fixed": dict(zip(("batch", "sequence", "capacity"), FIXED, strict=True)),
}


@pytest.fixture(scope="module", params=[(v, p) for v in VERSIONS for p in DTYPES], ids="-".join)
def asked(
    request: pytest.FixtureRequest, tensorrt_bundle_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What TensorRT has of every plugin of the trained checkpoint's graph, and of which dtype that is."""
    version, precision = request.param
    bundle = tensorrt_bundle_of(precision)
    member, dtype = DTYPES[precision]
    question = {"bundle": str(bundle), "capability": "8.9", "dtype": member, "profiles": PROFILES, "steps": STEPS}
    answer = ask_plugins(version, question, tmp_path_factory.mktemp("stubs"))
    assert answer["version"] == version
    return {**answer, "member": member, "dtype": dtype}


def one(asked: dict[str, Any], op: str, profile: str = "prefill") -> dict[str, Any]:
    """What every layer has of an op."""
    first, *others = [layer for layer in asked["profiles"][profile] if layer["op"] == op]
    assert others == [first] * (LAYERS - 1)
    return dict(first)


def shape_of(asked: dict[str, Any]) -> AttentionShape:
    return AttentionShape(**one(asked, "SplitAttention")["attributes"])


def steps_of(profile: str) -> list[tuple[int, int, int]]:
    return [FIXED] * len(STEPS) if profile == "fixed" else STEPS


def test_the_parser_finds_a_plugin_for_each_op_and_gives_it_no_attribute_of_the_node(asked: dict[str, Any]) -> None:
    """It gives those that a creator declares; one that is not declared is an error."""
    assert asked["creators"] == 2
    for layers in asked["profiles"].values():
        assert Counter(layer["op"] for layer in layers) == {"SplitAttention": LAYERS, "MergeAttention": LAYERS}
    for op, attributes in (
        ("SplitAttention", {"heads", "kv_heads", "head_dim", "rotary_dim", "scale"}),
        ("MergeAttention", {"to"}),
    ):
        found = one(asked, op)
        assert set(found["attributes"]) == attributes
        assert found["declared"] == []
        assert "Unexpected attribute heads" in found["unknown"]


@pytest.mark.parametrize("profile", PROFILES)
def test_outputs_are_what_the_ops_say(asked: dict[str, Any], profile: str) -> None:
    shape = shape_of(asked)
    parts, context = (one(asked, f"{op}Attention", profile) for op in ("Split", "Merge"))
    assert parts["dtypes"] == ["FLOAT"] * 3
    assert context["dtypes"] == [asked["member"]]
    for step, partials, merged in zip(steps_of(profile), parts["shapes"], context["shapes"], strict=True):
        batch, sequence, capacity = step
        expected = partial_shapes(batch, sequence, shape.heads, shape.head_dim, capacity)
        assert tuple(map(tuple, partials)) == expected
        assert merged == [[batch, sequence, shape.heads * shape.head_dim]]


@pytest.mark.parametrize("profile", PROFILES)
def test_tensorrt_times_every_block_size_and_small_ones_alone_for_a_token(asked: dict[str, Any], profile: str) -> None:
    half, partials = [asked["member"]], ["FLOAT"] * 3
    parts, context = (one(asked, f"{op}Attention", profile) for op in ("Split", "Merge"))
    assert parts["types"] == [*half * 5, "INT32", *partials]
    assert context["types"] == [*partials, "INT32", *half]
    assert parts["formats"] == context["formats"] == ["LINEAR"]
    configs = SPLIT_CONFIGS[shape_of(asked).head_dim]
    rows = 256 if profile == "prefill" else 1
    timed = [str(number) for number, config in enumerate(configs, 1) if rows > 1 or config.block_m == 16]
    assert list(parts["launches"]) == timed
    assert list(context["launches"]) == [str(number) for number in range(1, len(MERGE_CONFIGS) + 1)]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_block_size_is_launched_as_the_kernel_needs_it(asked: dict[str, Any], profile: str) -> None:
    from plugins.kernels.compile import compile_merge, compile_split

    shape, dtype, steps = shape_of(asked), asked["dtype"], steps_of(profile)
    for tactic, found in one(asked, "SplitAttention", profile)["launches"].items():
        config = SPLIT_CONFIGS[shape.head_dim][int(tactic) - 1]
        grids = [shape.split_grid(*step, config) for step in steps]
        check_launch(found, compile_split(shape, dtype, config, 89), grids)
        assert found["extra"] == [[sequence, capacity] for _, sequence, capacity in steps]
    for tactic, found in one(asked, "MergeAttention", profile)["launches"].items():
        merging = MERGE_CONFIGS[int(tactic) - 1]
        grids = [shape.merge_grid(batch, sequence) for batch, sequence, _ in steps]
        check_launch(found, compile_merge(shape, dtype, merging, 89), grids)
        assert found["extra"] == [[sequence, blocks_of(sequence, capacity)] for _, sequence, capacity in steps]


def check_launch(found: dict[str, Any], kernel: Any, grids: list[tuple[int, int, int]]) -> None:
    assert (found["name"], found["code"]) == (kernel.name, kernel.ptx)
    rest = {"block_x": kernel.threads, "block_y": 1, "block_z": 1, "shared_mem": kernel.shared_bytes}
    expected = [dict(zip(("grid_x", "grid_y", "grid_z"), grid, strict=True)) | rest for grid in grids]
    assert [{name: sizes[i] for name, sizes in found["params"].items()} for i in range(len(grids))] == expected


@pytest.mark.parametrize(("op", "inputs", "outputs"), [("SplitAttention", 6, 3), ("MergeAttention", 4, 1)], ids=str)
def test_a_kernel_takes_inputs_then_extra_arguments_then_outputs(
    asked: dict[str, Any], op: str, inputs: int, outputs: int
) -> None:
    for found in one(asked, op)["launches"].values():
        declared = re.search(rf"\.entry {found['name']}\((.*?)\)", found["code"], re.DOTALL)
        assert declared
        types = re.findall(r"\.param \.(u\d+)", declared[1])
        assert types == ["u64"] * inputs + ["u32"] * len(found["extra"][0]) + ["u64"] * outputs
