"""Sizes that users write, and how much memory a process is told that it has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from exporter.memory import available_memory, parse_size
from runtime.errors import UserError

GIB = 1024**3
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24GiB", 24 * GIB),
        ("16GB", 16 * 10**9),
        ("512MiB", 512 * 1024**2),
        ("1.5 gib", 3 * GIB // 2),
        ("4096", 4096),
        ("10 kB", 10_000),
        ("2TiB", 2 * 1024**4),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "much", "24G", "-1GB", "1,5GB", "12 GiBs", "GiB"])
def test_another_unit_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a size; .* known units: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"):
        parse_size(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine with 8 GiB that can be handed out, whose process holds 10 pages."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:    {8 * GIB // 1024} kB\n")
    (tmp_path / "proc" / "self" / "statm").write_text("500 10 3 1 0 4 0\n")
    return tmp_path


def group(machine: Path, place: str, files: dict[str, str]) -> None:
    directory = machine / "sys" / "fs" / "cgroup" / place
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(content)


def test_what_the_process_has_already_counts_as_its_own(machine: Path) -> None:
    assert available_memory(machine) == 8 * GIB + 10 * PAGE


def test_a_containers_limit_counts_where_it_is_lower_and_cached_files_do_not(machine: Path) -> None:
    (machine / "proc" / "self" / "cgroup").write_text("0::/box/job\n")
    group(machine, "box/job", {"memory.max": "max\n", "memory.current": "5\n"})
    stat = f"anon 7\ninactive_file {GIB}\n"
    group(machine, "box", {"memory.max": f"{4 * GIB}\n", "memory.current": f"{3 * GIB}\n", "memory.stat": stat})
    assert available_memory(machine) == 2 * GIB + 10 * PAGE


def test_a_limit_of_the_older_kind_counts(machine: Path) -> None:
    (machine / "proc" / "self" / "cgroup").write_text("9:cpu,cpuacct:/\n4:memory:/docker/abc\n")
    numbers = {"memory.limit_in_bytes": f"{3 * GIB}", "memory.usage_in_bytes": f"{GIB}"}
    group(machine, "memory", numbers)  # where a container sees its own group
    assert available_memory(machine) == 2 * GIB + 10 * PAGE


def test_a_group_that_is_over_its_limit_leaves_what_the_process_has(machine: Path) -> None:
    (machine / "proc" / "self" / "cgroup").write_text("0::/\n")
    group(machine, "", {"memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"})
    assert available_memory(machine) == 10 * PAGE


def test_a_system_that_tells_nothing_has_what_it_is_built_with(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == os.sysconf("SC_PHYS_PAGES") * PAGE


def test_this_machine_tells_something_sensible() -> None:
    assert 10**8 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * PAGE
