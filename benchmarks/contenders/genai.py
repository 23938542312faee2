"""onnxruntime-genai: graphs of its own model builder, run by its own generator."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.child import measured
from benchmarks.contenders.base import Contender, made, python_command, size_of, versions
from benchmarks.contenders.onnx_bytes import step_bytes
from benchmarks.contenders.serve import serve
from benchmarks.peers import GENAI
from tests.support.environments import environment

PEER = "onnxruntime-genai"
PACKAGES = ("onnxruntime-genai", "onnxruntime")
_CACHE_ITEM_BYTES = 4  # its graphs for the CPU keep keys and values in float32


def python(place: Path) -> Path:
    """Of its environment, made where there is none."""
    return environment("genai", GENAI, place=place) / "python"


def contenders(checkpoint: Path, directory: Path, place: Path, precisions: tuple[str, ...]) -> Iterator[Contender]:
    """Build the graphs that are not there yet."""
    command = [python(place), "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-e", "cpu"]
    for precision in precisions:
        flags = ("-p", precision, "-c", directory / "cache")
        model = made(
            directory / f"{PEER}-{precision}",
            lambda output, flags=flags: measured([*command, *flags, "-o", output], directory),  # type: ignore[misc]
        )
        decoder = json.loads((model / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        geometry = decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        yield Contender(
            PEER,
            precision,
            python_command(python(place), "genai", model),
            step_bytes(model / "model.onnx"),
            2 * geometry * _CACHE_ITEM_BYTES,
            size_of(model),
            versions(python(place), *PACKAGES),
        )


class Genai:
    """A model, and generators that go on."""

    def __init__(self, model: str) -> None:
        import onnxruntime_genai

        self._genai: Any = onnxruntime_genai
        self._model = self._genai.Model(model)
        self._generators: dict[str, Any] = {}

    def prompt(self, state: str, prompts: NDArray[np.int32], capacity: int) -> list[int]:
        """A new generator; a text as long as it may be has no end before."""
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(
            do_sample=False, batch_size=len(prompts), min_length=capacity + 1, max_length=capacity + 1
        )
        self._generators[state] = self._genai.Generator(self._model, params)
        self._generators[state].append_tokens(prompts)
        return self.step(state)

    def step(self, state: str) -> list[int]:
        """One round of its loop."""
        generator = self._generators[state]
        generator.generate_next_token()
        return [int(token) for token in generator.get_next_tokens()]


if __name__ == "__main__":
    serve(lambda: Genai(sys.argv[1]))
