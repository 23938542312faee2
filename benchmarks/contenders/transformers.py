"""transformers on torch, what every other is compared with: the model as its checkpoint is."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.contenders.base import CORES
from exporter.bench.process import Contender, driver_command

PEER = "transformers"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def contenders(checkpoint: Path, precisions: tuple[str, ...]) -> Iterator[tuple[Contender, Path]]:
    """In the project's own environment; with the files that each loads."""
    for precision in precisions:
        command = driver_command(sys.executable, "transformers", checkpoint, _DTYPES[precision], CORES)
        yield Contender(PEER, precision, command), checkpoint
