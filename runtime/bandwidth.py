"""How fast this machine's memory is read: what bounds a step that reads every weight once."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

_BYTES = 256 << 20  # beyond the caches
_READS = 5


class Bandwidth:
    """Memory that is read as fast as it goes, from one thread per core; the best of all readings counts."""

    def __init__(self, threads: int | None = None) -> None:
        """Take the memory.

        Args:
            threads: that read at once (default: one per core that the process may use).
        """
        self._threads = threads or len(os.sched_getaffinity(0))
        self._parts = np.array_split(np.ones(_BYTES // 8, np.int64), self._threads)
        self.bytes_per_s = 0.0

    def measure(self) -> float:
        """Read all of it a few times, about a tenth of a second; the best bytes per second so far."""
        with ThreadPoolExecutor(self._threads) as pool:
            for _ in range(_READS):
                started = time.perf_counter()
                # The largest of integers: numpy finds it faster than memory delivers them.
                list(pool.map(np.max, self._parts))
                self.bytes_per_s = max(self.bytes_per_s, _BYTES / (time.perf_counter() - started))
        return self.bytes_per_s
