"""What `kernel_speed` found: a table, what it is held to, and a picture of time by length."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LONG = 16_384  # keys from which on a step is reading the cache, and little else
BANDWIDTH_SHARE = 0.7  # of a copy's, at every length from LONG on
EXPONENT = 0.9  # of time by length from LONG on: 1 is proportional
SHORT_SHARE = 0.1  # what the shortest row may take of the time of the full capacity
MARKERS = "osD^v"


def share(report: Mapping[str, Any], row: Mapping[str, Any]) -> float:
    """Bytes a second that a step reads, as a part of what a copy moves."""
    return float(row["bytes"] / (row["milliseconds"] / 1e3) / report["copy_bytes_per_s"])


def table(report: Mapping[str, Any]) -> str:
    """A line for each batch and length, then the figures."""
    return "\n".join((*_rows(report), "", *_figures(report)))


def _rows(report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{report['gpu']}, copies at {report['copy_bytes_per_s'] / 1e9:.0f} GB/s; "
        f"{report['model']} in {report['dtype']}, capacity {report['capacity']}"
    )
    yield f"{'batch':>5}{'length':>9}{'µs':>10}{'of copy':>9}{'torch µs':>10}{'× torch':>10}"
    for row in report["rows"]:
        ours, torch = row["milliseconds"], row["torch_milliseconds"]
        yield (
            f"{row['batch']:5}{row['length']:9}{ours * 1e3:10.1f}{share(report, row):9.0%}"
            f"{torch * 1e3:10.1f}{torch / ours:10.2f}"
        )


def _figures(report: Mapping[str, Any]) -> Iterator[str]:
    for figure in report["figures"]:
        yield f"{'met' if figure['met'] else 'MISSED':8}{figure['figure']}: {figure['value']:.2f}"


def figures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the kernels are held to, for each batch: what was found, and whether it is enough."""
    found = []
    for batch, rows in _by_batch(report["rows"]):
        short, full = rows[0], rows[-1]
        long = [row for row in rows if row["length"] >= LONG]
        values = [
            ("least speed, of torch's", min(row["torch_milliseconds"] / row["milliseconds"] for row in rows), 1.0, True)
        ]
        if long:
            least = min(share(report, row) for row in long)
            values.append((f"least share of copy bandwidth from {LONG} on", least, BANDWIDTH_SHARE, True))
        if len(long) > 1:
            values.append((f"exponent of time by length from {LONG} on", _exponent(long), EXPONENT, True))
        if full["length"] >= LONG:
            shorter = short["milliseconds"] / full["milliseconds"]
            values.append((f"time at {short['length']} of that at {full['length']}", shorter, SHORT_SHARE, False))
        for what, value, bound, at_least in values:
            sign, met = ("≥", value >= bound) if at_least else ("≤", value <= bound)
            found.append({"figure": f"batch {batch}, {what} {sign} {bound}", "value": value, "met": met})
    return found


def _exponent(rows: Sequence[Mapping[str, Any]]) -> float:
    """The slope of a line through the logarithms of time and length, by least squares."""
    lengths, times = ([math.log(row[name]) for row in rows] for name in ("length", "milliseconds"))
    return statistics.linear_regression(lengths, times).slope


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Length against microseconds, both logarithmic, with what a copy at full speed would take."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    for marker, (batch, rows) in zip(MARKERS, _by_batch(report["rows"]), strict=False):
        lengths = [row["length"] for row in rows]
        (line,) = axes.plot(
            lengths, [row["milliseconds"] * 1e3 for row in rows], marker=marker, label=f"kernels, batch {batch}"
        )
        ours = line.get_color()
        torch = [row["torch_milliseconds"] * 1e3 for row in rows]
        axes.plot(lengths, torch, marker=marker, color=ours, linestyle="--", label=f"torch, batch {batch}")
        reading = [row["bytes"] / report["copy_bytes_per_s"] * 1e6 for row in rows]
        axes.plot(lengths, reading, color=ours, linestyle=":", label=f"reading alone, batch {batch}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(f"keys of a row, in a cache of {report['capacity']}")
    axes.set_ylabel("attention of one layer in a decode step (µs)")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    # Text stays text, and the same figures give the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemotron-export"}):
        figure.savefig(path, metadata={"Date": None})


def _by_batch(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
    for batch in dict.fromkeys(row["batch"] for row in rows):
        yield batch, sorted((row for row in rows if row["batch"] == batch), key=lambda row: int(row["length"]))
