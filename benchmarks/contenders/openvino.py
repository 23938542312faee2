"""OpenVINO: optimum-intel's conversion."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks.child import measured
from benchmarks.contenders.base import CORES, made
from benchmarks.peers import TORCH
from exporter.bench.process import Contender, driver_command
from tests.support.environments import environment

PEER = "openvino"
# optimum-intel 2 has dropped Nemotron.
REQUIREMENTS = ("optimum-intel==1.27.0", "openvino==2026.4.1", "nncf==3.4.0", "transformers<4.58", TORCH)
FLAGS = {"int8": (), "int4": ("--group-size", "128", "--ratio", "1.0")}  # all matrices at that precision


def contenders(
    checkpoint: Path, directory: Path, place: Path, precisions: tuple[str, ...]
) -> Iterator[tuple[Contender, Path]]:
    """Convert to the models that are not there yet; with the files that each loads."""
    bin_ = environment("openvino", REQUIREMENTS, constraints=None, place=place)
    command = [bin_ / "optimum-cli", "export", "openvino", "--model", checkpoint, "--task", "text-generation-with-past"]
    for precision in precisions:
        flags = ("--weight-format", precision, *FLAGS[precision])
        model = made(
            directory / f"{PEER}-{precision}",
            lambda output, flags=flags: measured([*command, *flags, output], directory),  # type: ignore[misc]
        )
        yield Contender(PEER, precision, driver_command(bin_ / "python", "openvino", model, CORES)), model
