"""What a session runs on, in words that change when it does; read from the system's files."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path

_PROC = Path("/proc")


def process_age() -> float | None:
    """Seconds since this process was started, in hundredths; None where the system does not tell."""
    if not (_PROC / "self/stat").exists():
        return None
    # The fields after the program's name, which may hold anything: the twentieth is when, in ticks since the boot.
    ticks = int((_PROC / "self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def cpu_name() -> str:
    """The processor's model and architecture: "AMD EPYC 9654 (x86_64)"."""
    found = _search(_PROC / "cpuinfo", r"^model name\s*:\s*(.+)$")
    return f"{found or platform.processor() or 'cpu'} ({platform.machine()})"


def cuda_name() -> str:
    """The NVIDIA GPUs and their driver's version: "NVIDIA L4, driver 580.82.07"."""
    cards = sorted(_PROC.glob("driver/nvidia/gpus/*/information"))
    gpus = (_search(card, r"^Model:\s*(.+)$") for card in cards)
    return f"{', '.join(filter(None, gpus)) or 'NVIDIA GPU'}, driver {driver_version() or 'unknown'}"


def driver_version() -> str | None:
    """The NVIDIA driver's version: "580.82.07"; None where there is none."""
    return _search(_PROC / "driver/nvidia/version", r"Kernel Module\b.*?\s(\d[\d.]*)\s")


def _search(path: Path, pattern: str) -> str | None:
    try:
        match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return match.group(1).strip() if match else None
