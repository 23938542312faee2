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
from benchmarks.kernel_speed_report import draw, figures, share, table

ROOT = Path(__file__).parents[2]


def report(short: float = 0.01, full: float = 1.0) -> dict[str, Any]:
    """Of a GPU that copies a GB in a millisecond; times in milliseconds at 512 and 131 072 keys."""
    rows = [
        {"batch": 1, "length": length, "milliseconds": time, "torch_milliseconds": 1.0, "bytes": size, "config": ""}
        for length, time, size in ((512, short, 10**6), (131_072, full, 8 * 10**8))
    ]
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
    assert share(good, good["rows"][1]) == pytest.approx(0.8)
    good["figures"] = figures(good)
    assert [figure["met"] for figure in good["figures"]] == [True, True, True]
    follows_capacity = figures(report(short=1.0))
    assert [figure["met"] for figure in follows_capacity] == [True, True, False]
    slow = report(full=2.0)
    slow["figures"] = figures(slow)
    assert [figure["met"] for figure in slow["figures"]] == [False, False, True]
    assert "MISSED  batch 1, share of copy bandwidth at 131072 ≥ 0.7: 0.40" in table(slow)
    assert "    1   131072    1000.0      80%    1000.0      1.00" in table(good)
    draw(good, tmp_path / "picture.svg")
    assert "torch, batch 1" in (tmp_path / "picture.svg").read_text()


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


def test_its_comparison_accepts_the_kernels_and_finds_a_scale_that_is_off() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COMPARE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"  # every block size
