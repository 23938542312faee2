"""This project: bundles exported anew by the command, each loaded in a process of its own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.child import OURS, measured
from benchmarks.contenders.onnx_bytes import step_bytes
from exporter.bench.ours import Ours
from exporter.bench.process import Contender
from exporter.bench.serve import serve

PEER = "nemotron-export"
_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}


def contenders(checkpoint: Path, directory: Path, precisions: tuple[str, ...]) -> Iterator[tuple[Contender, Path]]:
    """Export to `directory`, whatever is there: the exporter at hand is what is measured; with each one's files.

    A precision may be followed by a recipe: `int4 compact`.
    """
    for precision in precisions:
        bundle = directory / f"{PEER}-{precision.replace(' ', '-')}"
        shutil.rmtree(bundle, ignore_errors=True)
        grid, _, recipe = precision.partition(" ")
        options = ["--precision", grid, *(["--recipe", recipe] if recipe else [])]
        measured([*OURS, "export", checkpoint, bundle, *options, "--no-verify"])
        inputs = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["graph"]["inputs"]
        caches = [spec for spec in inputs if spec["name"].startswith("past_key_values.")]
        cache_bytes = sum(spec["shape"][1] * spec["shape"][3] * _ITEM_BYTES[spec["dtype"]] for spec in caches)
        command = (sys.executable, "-m", "benchmarks.contenders.ours", bundle)
        yield Contender(PEER, precision, command, step_bytes(bundle / "model.onnx"), cache_bytes), bundle


def _load(bundle: str) -> Ours:
    from runtime import load

    return Ours(load(bundle, task="text-generation"))


if __name__ == "__main__":
    serve(lambda: _load(sys.argv[1]))
