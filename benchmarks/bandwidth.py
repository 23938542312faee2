"""How fast this machine reads memory, and how fast that lets a decode step be.

python -m benchmarks.bandwidth
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BYTES = 1 << 29  # far more than caches hold


def read_bandwidth(rounds: int = 5) -> float:
    """Bytes a second: every core looks for the maximum of its part of an array; the best of some rounds."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(BYTES // 8, np.int64), cores)
    best = np.inf
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - started)
    return float(BYTES / best)


def roofline(bandwidth: float, step: int, rows: int) -> float:
    """Tokens a second of all rows, if a step took no longer than to read its bytes."""
    return rows * bandwidth / step


def main() -> int:
    """Print it."""
    print(f"{read_bandwidth() / 1e9:.1f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
