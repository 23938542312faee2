"""What the structure of a model costs, without its weights: trace, passes and lowering, by depth.

    python -m benchmarks.structure [--presets NAME ...] [--targets NAME ...] [--results FILE]

Each preset and target is a process of its own, in which one trace is lowered to every precision of the target; seconds
are of the slowest of them, the peak is of all. Exit code 1 where Nemotron-4-340B passes 180 s or 2 GB.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import measured
from benchmarks.make_checkpoint import PRESETS, config_of

RESULTS = Path(__file__).parent / "results" / "structure.json"
TARGETS = ("onnxruntime", "tensorrt")
SECONDS_LIMIT, GB_LIMIT = 180, 2.0
LARGEST = "nemotron-4-340b"


def stages(preset: str, target: str) -> dict[str, Any]:
    """Seconds by stage in this process, and by precision."""
    clock = _Clock()
    from exporter import passes
    from exporter.lowering import lower
    from exporter.recipe import FORMS, precision_of, read_recipe
    from exporter.rope import rope_tables
    from exporter.spec import spec_from_config
    from exporter.tasks import GENERATION, GraphForm
    from exporter.trace import trace

    spec = spec_from_config(config_of(preset), preset)
    seconds: dict[str, float] = {"import": clock.lap()}
    traced = trace(spec)
    seconds["trace"] = clock.lap()
    by_precision: dict[str, dict[str, float]] = {}
    for name in FORMS[target]:
        model = traced.clone()
        wanted = passes.Wanted(GENERATION, GraphForm(), precision_of(target, name, read_recipe(None)))
        clock.lap()
        passes.run(passes.pipeline(spec, *rope_tables(spec, spec.max_positions), wanted), model)
        took = {"passes": clock.lap()}
        lowered = lower(model, target, spec.layers)
        by_precision[name] = took | {"lowering": clock.lap()}
    slowest = max(sum(took.values()) for took in by_precision.values())
    total = round(sum(seconds.values()) + slowest, 2)
    return {"seconds": total, **seconds, "precisions": by_precision, "attention": lowered.attention}


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        last, self._last = self._last, time.perf_counter()
        return round(self._last - last, 3)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; exit code 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--here", action="store_true", help="one preset and target in this process; prints its JSON")
    given = parser.parse_args(arguments)
    if given.here:
        print(json.dumps(stages(given.presets[0], given.targets[0])))
        return 0
    rows: list[dict[str, Any]] = []
    for preset in given.presets:
        for target in given.targets:
            command = (sys.executable, "-m", "benchmarks.structure", "--here", "--presets", preset, "--targets", target)
            done = measured(command)
            peak = round(done.peak_bytes / 1e9, 3)
            rows.append({"preset": preset, "target": target, "peak_gb": peak, **json.loads(done.output)})
            print(f"{preset:16} {target:12} {rows[-1]['seconds']:7.1f} s  {peak:.2f} GB", flush=True)
    report = {"schema": 1, "limits": {LARGEST: {"seconds": SECONDS_LIMIT, "peak_gb": GB_LIMIT}}, "results": rows}
    given.results.write_text(json.dumps(report, indent=2) + "\n")
    largest = [row for row in rows if row["preset"] == LARGEST]
    print(f"limits of {LARGEST}: {SECONDS_LIMIT} s, {GB_LIMIT} GB")
    return int(any(row["seconds"] > SECONDS_LIMIT or row["peak_gb"] > GB_LIMIT for row in largest))


if __name__ == "__main__":
    sys.exit(main())
