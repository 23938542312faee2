"""Seconds and memory of building an engine as wide as Minitron-4B, with two of its layers and its whole vocabulary.

    python -m benchmarks.build_engine [--directory DIR] [--results FILE]

Needs tensorrt-rtx but no GPU, 11 GB of memory and 11 GB of disk. The build runs in a process of its own, so that the
peak is its own; memory is given relative to the weights' bytes, because that is what a larger model scales by.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.make_checkpoint import config_of, write_checkpoint

CONFIG = config_of("minitron-4b", num_hidden_layers=2)
CAPABILITY = "8.9"
SECONDS_LIMIT, MEMORY_LIMIT = 60, 2.2


def measure(directory: Path) -> dict[str, Any]:
    """Build the engine in `directory`, where the bundle is made unless it is there."""
    bundle = directory / "wide-tensorrt-fp16"
    if not bundle.exists():
        checkpoint = directory / "wide"
        if not checkpoint.exists():
            write_checkpoint(checkpoint, CONFIG, "float16")
        _command("export", checkpoint, bundle, "--target", "tensorrt", "--precision", "fp16", "--no-verify")
    flags = ("--flavor", "tensorrt-rtx", "--compute-capability", CAPABILITY, "--force")
    built = _command("build", bundle, *flags)
    weights = (bundle / "model.onnx.data").stat().st_size
    return {
        "schema": 1,
        "config": CONFIG,
        "cores": os.cpu_count(),
        "engine": built["engine"],
        "seconds": built["seconds"],
        "weights_bytes": weights,
        "plan_bytes": built["plan_bytes"],
        "peak_rss_bytes": round(built["peak_rss_mb"] * 1e6),
        "peak_over_weights": round(built["peak_rss_mb"] * 1e6 / weights, 3),
    }


def main() -> int:
    """Print the measurements; exit code 1 where one passes its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where checkpoint and bundle stay; a temporary one by default")
    parser.add_argument("--results", type=Path, help="a file that the JSON goes into")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments.directory or Path(temporary))
    if arguments.results:
        arguments.results.write_text(json.dumps(result, indent=2) + "\n")
    print(f"engine   {result['engine']['flavor']} {result['engine']['version']}, {result['plan_bytes'] / 1e9:.2f} GB")
    print(f"seconds  {result['seconds']:.1f}  limit {SECONDS_LIMIT}")
    print(f"peak     {result['peak_rss_bytes'] / 1e9:.2f} GB, weights {result['weights_bytes'] / 1e9:.2f} GB")
    print(f"ratio    {result['peak_over_weights']:.2f}  limit {MEMORY_LIMIT}")
    return int(result["seconds"] > SECONDS_LIMIT or result["peak_over_weights"] > MEMORY_LIMIT)


def _command(*arguments: object) -> dict[str, Any]:
    program = "from exporter.cli import main; main()"
    command = [sys.executable, "-c", program, *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)  # noqa: S603 - our own program
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
