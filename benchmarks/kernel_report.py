"""Registers, spills and shared memory of every attention kernel, for every target; needs no GPU.

    python -m benchmarks.kernel_report [--results DIRECTORY] [--jobs N]

Compiles what an engine may carry (`plugins.kernels`) for the shapes of real models, takes the assembler's report, and
writes `kernels.json` and `kernels.md`. Exit code 1 where a kernel spills, or needs more shared memory than a launch
gives unasked.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.make_checkpoint import PRESETS
from plugins.kernels.shape import (
    DTYPES,
    MERGE_CONFIGS,
    SHARED_BYTES,
    SPLIT_CONFIGS,
    TARGETS,
    AttentionShape,
    MergeConfig,
    SplitConfig,
)

RESULTS = Path(__file__).parent / "results"
FACTOR = 0.5  # of the rotation, in every model of this architecture
_OF_NOBODY = {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 96}
MODELS = dict(PRESETS)
MODELS["96 wide"] = _OF_NOBODY


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target."""

    model: str
    dtype: str
    config: SplitConfig | MergeConfig
    sm: int


def shape_of(model: Mapping[str, Any]) -> AttentionShape:
    """The attention of a checkpoint's configuration."""
    width = model["head_dim"]
    heads, kv_heads = model["num_attention_heads"], model["num_key_value_heads"]
    return AttentionShape(heads, kv_heads, width, int(width * FACTOR), float(width**-0.5))


def kernels() -> list[Kernel]:
    """Everything that is shipped, for every model."""
    return [
        Kernel(name, dtype, config, sm)
        for name, model in MODELS.items()
        for dtype, config, sm in product(DTYPES, (*SPLIT_CONFIGS[model["head_dim"]], *MERGE_CONFIGS), TARGETS)
    ]


def measure(kernel: Kernel) -> dict[str, Any]:
    """What the compiler says of it."""
    from plugins.kernels.compile import compile_merge, compile_split

    shape = shape_of(MODELS[kernel.model])
    split = isinstance(kernel.config, SplitConfig)
    made = (compile_split if split else compile_merge)(shape, kernel.dtype, kernel.config, kernel.sm)
    return {
        "kernel": "SplitAttention" if split else "MergeAttention",
        "model": kernel.model,
        "head_dim": shape.head_dim,
        "dtype": kernel.dtype,
        "sm": kernel.sm,
        "config": asdict(kernel.config),
        "registers": made.registers,
        "spill_stores": made.spill_stores,
        "spill_loads": made.spill_loads,
        "shared_bytes": made.shared_bytes,
        "threads": made.threads,
        "cubin_bytes": len(made.cubin),
        "ptx_bytes": len(made.ptx),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line for each configuration of each model, the greatest of its types, registers by target."""
    targets = sorted({row["sm"] for row in rows})
    head = ["model", "kernel", "config", *(f"sm_{sm}" for sm in targets), "spilled", "shared KiB"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for (model, kernel, config), found in _grouped(rows):
        registers = [max(row["registers"] for row in found if row["sm"] == sm) for sm in targets]
        spilled = max(row["spill_stores"] + row["spill_loads"] for row in found)
        shared = max(row["shared_bytes"] for row in found) / 1024
        cells = [model, kernel, config, *map(str, registers), str(spilled), f"{shared:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _grouped(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str, str], list[Mapping[str, Any]]]]:
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        config = ", ".join(f"{name} {value}" for name, value in row["config"].items())
        groups.setdefault((row["model"], row["kernel"], config), []).append(row)
    yield from groups.items()


def failures(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Kernels that spill, or that need more shared memory than a launch gives unasked."""
    return [row for row in rows if row["spill_stores"] or row["spill_loads"] or row["shared_bytes"] > SHARED_BYTES]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the two files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile at once")
    given = parser.parse_args(arguments)
    import triton

    wanted = kernels()
    rows = []
    with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
        for row in pool.map(measure, wanted):
            rows.append(row)
            if len(rows) % 20 == 0:
                print(f"{len(rows)} of {len(wanted)}", file=sys.stderr, flush=True)
    report = {
        "schema": 1,
        "triton": triton.__version__,
        "limits": {"spill_bytes": 0, "shared_bytes": SHARED_BYTES},
        "results": rows,
    }
    (given.results / "kernels.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (given.results / "kernels.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))
    wrong = failures(rows)
    for row in wrong:
        print(f"over a limit: {row}", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
