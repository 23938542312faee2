"""onnxruntime-genai: graphs of its own model builder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks.child import measured
from benchmarks.contenders.base import CORES, made
from benchmarks.contenders.onnx_bytes import step_bytes
from benchmarks.peers import GENAI
from exporter.bench.process import Contender, driver_command
from tests.support.environments import environment

PEER = "onnxruntime-genai"
_CACHE_ITEM_BYTES = 4  # its graphs for the CPU keep keys and values in float32


def python(place: Path) -> Path:
    """Of its environment, made where there is none."""
    return environment("genai", GENAI, place=place) / "python"


def contenders(
    checkpoint: Path, directory: Path, place: Path, precisions: tuple[str, ...]
) -> Iterator[tuple[Contender, Path]]:
    """Build the graphs that are not there yet; with the files that each loads."""
    command = [python(place), "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-e", "cpu"]
    for precision in precisions:
        flags = ("-p", precision, "-c", directory / "cache")
        model = made(
            directory / f"{PEER}-{precision}",
            lambda output, flags=flags: measured([*command, *flags, "-o", output], directory),  # type: ignore[misc]
        )
        decoder = json.loads((model / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        geometry = decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        contender = Contender(
            PEER,
            precision,
            driver_command(python(place), "genai", model, CORES),
            step_bytes(model / "model.onnx"),
            2 * geometry * _CACHE_ITEM_BYTES,
        )
        yield contender, model
