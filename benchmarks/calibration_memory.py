"""What calibration adds to the memory of an export, beside what one layer takes.

    python -m benchmarks.calibration_memory [--tokens N] [--results FILE]

A random checkpoint of 12 layers, 1024 wide, is exported to int4 in processes of their own, without the gate, which
holds the whole model: rounded to the nearest point, scaled by calibration, and with GPTQ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.make_checkpoint import PRESETS, config_of, write_checkpoint

RESULTS = Path(__file__).parent / "results" / "calibration-memory.json"
SHAPE = PRESETS["242m"] | {"num_hidden_layers": 12}
RECIPES = {"nearest": "", "scaling": "scaling = true\n", "gptq": 'method = "gptq"\nscaling = true\n'}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    hidden, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    grouped = SHAPE["head_dim"] * SHAPE["num_key_value_heads"]
    weights = 4 * hidden * (2 * hidden + 2 * grouped + 2 * inner)
    # What the four products read, keys and values, and the residual stream.
    activations = 4 * given.tokens * (3 * hidden + inner + 2 * grouped + hidden)
    report = {
        "schema": 1,
        "tokens": given.tokens,
        "shape": SHAPE,
        "layer_mb": {"weights in fp32": weights / 1e6, "activations": activations / 1e6},
        "peak_rss_mb": {},
    }
    with tempfile.TemporaryDirectory() as place:
        checkpoint = write_checkpoint(Path(place) / "checkpoint", config_of("242m", **SHAPE), "float16")
        for name, recipe in RECIPES.items():
            path = Path(place) / f"{name}.toml"
            path.write_text(recipe)
            command = ["nemotron-export", "export", str(checkpoint), f"{place}/{name}", "--precision", "int4"]
            options = ["--recipe", str(path), "--calibration-tokens", str(given.tokens), "--no-verify", "--json"]
            done = subprocess.run([*command, *options], stdout=subprocess.PIPE, check=True)  # noqa: S603
            report["peak_rss_mb"][name] = json.loads(done.stdout)["peak_rss_mb"]  # type: ignore[index]
            print(name, report["peak_rss_mb"][name], flush=True)  # type: ignore[index]
    given.results.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
