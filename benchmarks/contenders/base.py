"""What setting contenders up has in common: files that are made once, and their size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

CORES = len(os.sched_getaffinity(0))  # every one takes part


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`; where it is not there yet, `make` writes it under another name first: what is there is whole."""
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        make(partial)
        partial.rename(path)
    return path


def size_of(place: Path) -> int:
    """Bytes of a file, or of a directory's files."""
    return sum(path.stat().st_size for path in (place, *place.rglob("*")) if path.is_file())
