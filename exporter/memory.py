"""Memory: sizes as people write them, and what a process may use here."""

from __future__ import annotations

import ctypes
import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import UserError

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
# Where control groups of version 2 and 1 keep a limit, what counts against it, and what of that is files' content,
# which the system gives up before it refuses anything.
_GROUPS = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def parse_size(text: str) -> int:
    """Bytes of a size as people write it: `24GiB`, `16 GB`, `512MiB`, `1.5GB`, or bytes alone.

    Raises:
        UserError: it is none of these.
    """
    found = _SIZE.fullmatch(text)
    units = {name.lower(): factor for name, factor in UNITS.items()}
    factor = units.get((found[2] or "B").lower()) if found else None
    if found is None or factor is None:
        raise UserError(f"{text!r} is not a size; write 24GiB or bytes alone; known units: {', '.join(UNITS)}")
    return int(float(found[1]) * factor)


def size(count: float) -> str:
    """A number of bytes as people read it (1 kB is 1000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may use in all: what it has, and what it can still get.

    The latter is what the kernel can hand out without swapping, or what is left to the process's control group
    (https://docs.kernel.org/admin-guide/cgroup-v2.html) where that is less. Where neither is told, as on other systems
    than Linux, it is the machine's memory.

    Args:
        root: where `proc` and `sys` are.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    fields = _read(root / "proc" / "self" / "statm").split()
    own = int(fields[1]) * page if fields else 0
    free = re.search(r"^MemAvailable:\s*(\d+) kB", _read(root / "proc" / "meminfo"), re.MULTILINE)
    if free is None:
        return os.sysconf("SC_PHYS_PAGES") * page
    return own + min(int(free[1]) * 1024, *_left_in_groups(root))


def release() -> None:
    """Give what is free back to the system: cycles are kept until they are looked for, blocks by glibc for later."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _left_in_groups(root: Path) -> Iterator[int]:
    """What is left in the process's control group, and in every one above it."""
    yield from (2**63, 2**63)  # no limit
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in _GROUPS:
            continue
        top, (limit, usage, files) = root / "sys" / "fs" / "cgroup" / controllers, _GROUPS[controllers]
        group = Path(path)
        for above in (group, *group.parents):
            place = top / above.relative_to(above.anchor)
            found, used = _read(place / limit).strip(), _read(place / usage).strip()
            if found.isdigit() and used.isdigit():
                kept = re.search(rf"^{files} (\d+)", _read(place / "memory.stat"), re.MULTILINE)
                yield max(0, int(found) - int(used) + (int(kept[1]) if kept else 0))


def _read(path: Path) -> str:
    """A file of the kernel's; nothing where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
