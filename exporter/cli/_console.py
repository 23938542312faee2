"""How commands speak: results on stdout (one JSON object, or aligned text), everything else on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.memory import size

if TYPE_CHECKING:
    from rich.progress import TaskID

    from runtime.measured import Calibration, Comparison

Progress = Callable[[str, int, int], None]

__all__ = [
    "Progress",
    "describe_calibration",
    "describe_progress",
    "duration",
    "emit_json",
    "note",
    "print_comparisons",
    "print_facts",
    "print_table",
    "size",
    "stages",
    "writing",
]

IN_BYTES = ("weights",)  # stages that count bytes
EVERY = 10.0  # seconds between the lines of a stage in a log


def emit_json(value: dict[str, Any]) -> None:
    """Print the command's one JSON object, in ASCII: it survives every terminal's encoding."""
    click.echo(json.dumps(value, allow_nan=False))


def note(text: str) -> None:
    """Say something on stderr that is not the result."""
    click.echo(click.style(text, dim=True), err=True)


def print_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Print names and values, aligned; values that are None or empty are left out."""
    shown = [(name, value) for name, value in facts if value not in (None, "")]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        click.echo(f"{click.style(name.ljust(width), bold=True)}  {value}")


def print_table(rows: Sequence[Sequence[str]], indent: str = "  ") -> None:
    """Print columns, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo(indent + "  ".join(cells).rstrip())


def describe_calibration(calibration: Calibration | None) -> str:
    """What was chosen by which text, and the largest magnitude of any layer before and after it was scaled."""
    if calibration is None:
        return ""
    told = f"{', '.join(calibration.methods)} by {calibration.tokens} tokens of {calibration.text}"
    if not calibration.ranges:
        return told
    before, after = (max(getattr(layer, when) for layer in calibration.ranges) for when in ("before", "after"))
    return f"{told}; largest magnitude in fp16 {after:.4g}, before scaling {before:.4g}"


def print_comparisons(comparisons: Sequence[Comparison]) -> None:
    """Print what was compared, one line each: what, how far off, the limit, the verdict."""
    from runtime.measured import NO_LIMIT

    rows = [
        (
            comparison.name,
            comparison.case,
            comparison.metric,
            "not finite" if comparison.value is None else f"{comparison.value:.3g}",
            f"limit {comparison.limit:.3g}" if comparison.limit < NO_LIMIT else "no limit",
            "ok" if comparison.passed else "FAILED",
        )
        for comparison in comparisons
    ]
    print_table(rows)


def duration(seconds: float) -> str:
    """A time as people read it."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def describe_progress(stage: str, done: int, total: int, seconds: float) -> str:
    """How far a stage is that has run for so long: bytes and their speed where it counts them, and the time left."""
    told = []
    if stage in IN_BYTES:
        told.append(f"{size(done)} of {size(total)}")
        if seconds > 0:
            told.append(f"{size(done / seconds)}/s")
    if 0 < done < total:
        told.append(f"{duration(seconds * (total - done) / done)} left")
    return ", ".join(told)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the destination in an error of the file system that names no file, such as a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def stages() -> Iterator[Progress]:
    """Show on stderr how far each stage is and how long it took; what libraries print goes there too."""
    with redirect_stdout(sys.stderr), _bars() if sys.stderr.isatty() else _lines() as progress:
        yield progress


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        *(TextColumn("{task.description:11}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()),
        TextColumn("{task.fields[told]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, told="")
            # A stage that counts nothing moves to and fro until it is done.
            bars.update(tasks[stage], completed=done, total=total if total > 1 or done else None)
            if total > 1:
                elapsed = bars.tasks[bars.task_ids.index(tasks[stage])].elapsed or 0.0
                bars.update(tasks[stage], told=describe_progress(stage, done, total, elapsed))

        yield show


@contextmanager
def _lines() -> Iterator[Progress]:
    """One line a stage, when the next one begins, and of a long one now and then how far it is: what fits a log."""
    running: list[tuple[str, float]] = []
    last = 0.0

    def finish() -> None:
        for stage, started in running:
            note(f"{stage:8} {time.perf_counter() - started:6.1f} s")
        running.clear()

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if not running or running[0][0] != stage:
            finish()
            running.append((stage, now))
            last = now
        if now - last >= EVERY and 0 < done < total:
            note(f"{stage:8} {100 * done / total:5.0f} %  {describe_progress(stage, done, total, now - running[0][1])}")
            last = now

    yield show
    finish()
