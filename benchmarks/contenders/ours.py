"""This project: bundles exported anew by the command, and driven as a user does, by `runtime.load(…).stream(…)`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from benchmarks.child import OURS, measured
from benchmarks.contenders.base import Contender, python_command, size_of, versions
from benchmarks.contenders.onnx_bytes import step_bytes
from benchmarks.contenders.serve import serve

if TYPE_CHECKING:
    from runtime.generate import Event

PEER = "nemotron-export"
PACKAGES = ("onnxruntime", "numpy")
_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}


def contenders(checkpoint: Path, directory: Path, precisions: tuple[str, ...]) -> Iterator[Contender]:
    """Export to `directory`, whatever is there: the exporter at hand is what is measured.

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
        yield Contender(
            PEER,
            precision,
            python_command(sys.executable, "ours", bundle),
            step_bytes(bundle / "model.onnx"),
            cache_bytes,
            size_of(bundle),
            versions(sys.executable, *PACKAGES),
        )


class Ours:
    """A bundle, and generations that go on."""

    def __init__(self, bundle: str) -> None:
        from runtime import load

        self._model = load(bundle, task="text-generation")
        self._states: dict[str, tuple[Iterator[Event], int]] = {}

    def prompt(self, state: str, prompts: NDArray[np.int32], capacity: int) -> list[int]:
        """Begin a generation as long as the capacity allows."""
        rows, length = prompts.shape
        most = capacity - length + 1  # the last is not written
        events = self._model.stream(list(prompts.tolist()), greedy=True, ignore_eos=True, max_new_tokens=most)
        self._states[state] = events, rows
        return self.step(state)

    def step(self, state: str) -> list[int]:
        """The next event of every row."""
        events, rows = self._states[state]
        return [event.token_id for event in islice(events, rows)]


if __name__ == "__main__":
    serve(lambda: Ours(sys.argv[1]))
