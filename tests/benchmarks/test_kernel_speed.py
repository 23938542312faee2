"""The kernels' measurement on a GPU, as far as it goes without one: it must be right before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernel_speed
from benchmarks.kernel_report import failures
from benchmarks.kernel_report import table as kernel_table
from benchmarks.kernel_speed_report import draw, figures, table

ROOT = Path(__file__).parents[2]


def report(slower: float = 1.0, floor: float = 0.0, torch: float = 1.1) -> dict[str, Any]:
    """Of a GPU that copies a GB in a millisecond, at 80 % of that by length; torch takes so much of our time."""
    rows = []
    for length in (512, 16_384, 131_072):
        size = length * 4096
        ours = max(slower * size / 8e8, floor)
        times = {"milliseconds": ours, "torch_milliseconds": torch * ours}
        rows.append({"batch": 1, "length": length, "bytes": size, "config": "", **times})
    made = {"gpu": "a GPU", "model": "m", "dtype": "float16", "capacity": 131_072, "copy_bytes_per_s": 1e12}
    return made | {"rows": rows}


def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert kernel_speed.main(["--results", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: torch sees no NVIDIA GPU")
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_figures_say_what_was_reached_and_what_was_missed(tmp_path: Path) -> None:
    good = report()
    good["figures"] = figures(good)
    assert [figure["value"] for figure in good["figures"]] == pytest.approx([1.1, 0.8, 1.0, 512 / 131_072])
    assert all(figure["met"] for figure in good["figures"])

    def met(**changes: float) -> list[bool]:
        return [figure["met"] for figure in figures(report(**changes))]

    assert met(torch=0.99) == [False, True, True, True]
    assert met(slower=1.2) == [True, False, True, True]
    assert met(floor=0.12) == [True, False, False, False]  # as where time follows the capacity
    slow = report(slower=1.2)
    slow["figures"] = figures(slow)
    assert "MISSED  batch 1, least share of copy bandwidth from 16384 on ≥ 0.7: 0.67" in table(slow)
    assert "    1   131072     671.1      80%     738.2      1.10" in table(good)
    draw(good, tmp_path / "picture.svg")
    assert "torch, batch 1" in (tmp_path / "picture.svg").read_text()


def test_a_smaller_cache_is_held_to_what_it_can_show() -> None:
    small = report()
    del small["rows"][1:]
    assert [figure["figure"] for figure in figures(small)] == ["batch 1, least speed, of torch's ≥ 1.0"]


def test_what_spills_or_wants_too_much_shared_memory_is_told() -> None:
    row = {
        "kernel": "SplitAttention",
        "model": "m",
        "config": {"block_m": 16},
        "sm": 80,
        "registers": 96,
        "spill_stores": 0,
        "spill_loads": 0,
        "shared_bytes": 48 << 10,
    }
    spills, greedy = row | {"sm": 90, "spill_stores": 8}, row | {"sm": 120, "shared_bytes": (48 << 10) + 1}
    assert failures([row, spills, greedy]) == [spills, greedy]
    assert "| m | SplitAttention | block_m 16 | 96 | 96 | 96 | 8 | 48.0 |" in kernel_table([row, spills, greedy])


COMPARE = """
from dataclasses import replace
from benchmarks import kernel_speed
from plugins.kernels.shape import AttentionShape

step = kernel_speed.Step(AttentionShape(2, 1, 64, 32, 0.125), (70, 30), 3, 70)
assert kernel_speed.wrong([step], "cpu") == []
meant = kernel_speed.expected
kernel_speed.expected = lambda step, inputs: meant(replace(step, shape=replace(step.shape, scale=0.13)), inputs)
print(len(kernel_speed.wrong([step], "cpu")))
"""


@pytest.mark.slow
def test_its_comparison_accepts_the_kernels_and_finds_a_scale_that_is_off() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"  # every block size
