"""A command in a process of its own: its seconds and its peak memory, as the operating system counts them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = (sys.executable, "-c", "from exporter.cli import main; main()")


@dataclass(frozen=True)
class Measured:
    """A command's wall seconds, those of all its cores, the peak of its largest process, and what it printed."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    output: str

    def to_json(self) -> dict[str, float]:
        """Seconds, and memory in GB (10⁹ bytes)."""
        return {
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
            "peak_gb": round(self.peak_bytes / 1e9, 3),
        }


def measured(command: Sequence[object], directory: Path = ROOT) -> Measured:
    """Run a command in a directory.

    A process that is started takes over its parent's peak, so this one should stay small: no torch in it.

    Raises:
        SystemExit: the command failed; with the end of what it said.
    """
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(list(map(str, command)), stdout=output, stderr=errors, cwd=directory)  # noqa: S603
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            said = errors.read()[-2000:].decode(errors="replace")
            raise SystemExit(f"{' '.join(map(str, command))} failed with exit code {process.returncode}:\n{said}")
        output.seek(0)
        cpu = usage.ru_utime + usage.ru_stime
        return Measured(seconds, cpu, usage.ru_maxrss * 1024, output.read().decode())
