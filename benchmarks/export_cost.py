"""What an export of a large checkpoint costs, beside copying as many bytes: seconds, and memory of its process.

    python -m benchmarks.export_cost [--presets NAME ...] [--cases CASE ...] [--gate] [--directory DIR] [--results FILE]

A case is a precision, or `link`: bf16 with `--weights link`. Each export is a process of its own; after it, in the same
run, its output is copied and synced, which is what `copy` means. The outputs are deleted as it goes; what is there at
once is the checkpoint, a bundle and its copy. Nothing is dropped from the page cache.

With --gate exports pass the parity gate under `--memory 4GiB`, and below fp32 are measured on 256 tokens; of these, the
gate's seconds and the peak count.
Exit code 1 where a limit is passed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import OURS, Measured, measured
from benchmarks.make_checkpoint import PRESETS

RESULTS = Path(__file__).parent / "results" / "export-cost.json"
LINK = "link"
CASES = ("bf16", "fp32", "int4", LINK)
MEMORY, EVAL_TOKENS = "4GiB", "256"
PEAK_GB = 1.5
COPY_SECONDS, COPY_FACTOR, LINK_SECONDS = 25, 1.5, 30
GATE_FACTOR, GATE_GB = 2.2, 0.6


def export(checkpoint: Path, bundle: Path, case: str, gate: bool) -> tuple[Measured, dict[str, float]]:
    """Export a case; what it took, and its seconds by stage."""
    flags = ["--precision", "bf16", "--weights", "link"] if case == LINK else ["--precision", case]
    flags += ["--memory", MEMORY, "--eval-tokens", EVAL_TOKENS] if gate else ["--no-verify"]
    done = measured([*OURS, "export", checkpoint, bundle, *flags, "--json"])
    return done, json.loads(done.output)["seconds"]


def measure(checkpoint: Path, scratch: Path, case: str, gate: bool) -> dict[str, Any]:
    """An export, its copy, and the limits of both."""
    bundle, copy = scratch / "bundle", scratch / "copy"
    try:
        done, stages = export(checkpoint, bundle, case, gate)
        size = sum(path.stat().st_size for path in bundle.rglob("*") if not path.is_symlink() and path.is_file())
        script = 'cp -r "$1" "$2" && find "$2" -type f -exec sync {} +'
        copied = measured(["sh", "-c", script, "sh", bundle, copy]).seconds
    finally:
        for made in (bundle, copy):
            shutil.rmtree(made, ignore_errors=True)
    limits = {"peak_gb": PEAK_GB, "seconds": LINK_SECONDS if case == LINK else COPY_SECONDS + COPY_FACTOR * copied}
    if gate:
        limits = {"peak_gb": GATE_FACTOR * layer_bytes(checkpoint) / 1e9 + GATE_GB}
    return {
        "case": case,
        "output_gb": round(size / 1e9, 3),
        **done.to_json(),
        "copy_seconds": round(copied, 2),
        "stages": stages,
        "limits": {name: round(limit, 2) for name, limit in limits.items()},
    }


def layer_bytes(checkpoint: Path) -> int:
    """What a decoder layer's matrices take in fp32."""
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    names = ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    hidden, width, heads, kv_heads, mlp = (config[name] for name in names)
    return int(4 * hidden * (2 * width * (heads + kv_heads) + 2 * mlp))


def passed(row: dict[str, Any]) -> bool:
    """Whether a measurement is within its limits."""
    return all(row[name] <= limit for name, limit in row["limits"].items())


def _checkpoint(place: Path, preset: str) -> Path:
    """Made by another process, whose memory would else be the exports' too."""
    checkpoint = place / preset
    if not checkpoint.exists():
        measured([sys.executable, "-m", "benchmarks.make_checkpoint", "--preset", preset, checkpoint])
    return checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write after every case; exit code 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["minitron-4b"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--gate", action="store_true", help=f"with the parity gate, under --memory {MEMORY}")
    parser.add_argument("--directory", type=Path, help="where checkpoints stay; a temporary one by default")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=given.directory) as temporary:
        scratch = Path(temporary)
        for preset in given.presets:
            checkpoint = _checkpoint(given.directory or scratch, preset)
            for case in given.cases:
                rows.append({"preset": preset, "gate": given.gate, **measure(checkpoint, scratch, case, given.gate)})
                _print(rows[-1])
                given.results.write_text(json.dumps({"schema": 1, "results": rows}, indent=2) + "\n")
            if given.directory is None:
                shutil.rmtree(checkpoint)
    return int(not all(map(passed, rows)))


def _print(row: dict[str, Any]) -> None:
    limits = ", ".join(f"{name} ≤ {limit}" for name, limit in row["limits"].items())
    gate = f"  gate {row['stages']['verify']:.1f} s" if row["gate"] else ""
    print(
        f"{row['preset']:14} {row['case']:5} {row['seconds']:7.1f} s  {row['peak_gb']:.2f} GB  copy of "
        f"{row['output_gb']:.2f} GB {row['copy_seconds']:.1f} s{gate}  {'ok' if passed(row) else 'OVER'}: {limits}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
