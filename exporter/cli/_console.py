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

if TYPE_CHECKING:
    from rich.progress import TaskID

    from runtime.measured import Calibration, Comparison

Progress = Callable[[str, int, int], None]


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
    rows = [
        (
            comparison.name,
            comparison.case,
            comparison.metric,
            "not finite" if comparison.value is None else f"{comparison.value:.3g}",
            f"limit {comparison.limit:.3g}",
            "ok" if comparison.passed else "FAILED",
        )
        for comparison in comparisons
    ]
    print_table(rows)


def size(count: float) -> str:
    """A number of bytes as people read it (1 kB is 1000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


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

    columns = (TextColumn("{task.description:8}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage)
            # A stage that counts nothing moves to and fro until it is done.
            bars.update(tasks[stage], completed=done, total=total if total > 1 or done else None)

        yield show


@contextmanager
def _lines() -> Iterator[Progress]:
    """One line a stage, when the next one begins: what fits a log."""
    running: list[tuple[str, float]] = []

    def finish() -> None:
        for stage, started in running:
            note(f"{stage:8} {time.perf_counter() - started:6.1f} s")
        running.clear()

    def show(stage: str, *_: int) -> None:
        if not running or running[0][0] != stage:
            finish()
            running.append((stage, time.perf_counter()))

    yield show
    finish()
