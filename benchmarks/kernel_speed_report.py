"""What `kernel_speed` found: a table, what it is held to, and a picture of time by length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Of decoding at the greatest length, where reading the cache is all there is to do.
BANDWIDTH_SHARE = 0.7
SLOWER_THAN_TORCH = 1.1
# What a row of 512 keys may take of the time of the full capacity.
SHORT_SHARE = 0.1
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
    yield f"{'batch':>5}{'length':>9}{'µs':>10}{'of copy':>9}{'torch µs':>10}{'of torch':>10}"
    for row in report["rows"]:
        ours, torch = row["milliseconds"], row["torch_milliseconds"]
        yield (
            f"{row['batch']:5}{row['length']:9}{ours * 1e3:10.1f}{share(report, row):9.0%}"
            f"{torch * 1e3:10.1f}{ours / torch:10.2f}"
        )


def _figures(report: Mapping[str, Any]) -> Iterator[str]:
    for figure in report["figures"]:
        yield f"{'met' if figure['met'] else 'MISSED':8}{figure['figure']}: {figure['value']:.2f}"


def figures(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the kernels are held to, for each batch: what was found, and whether it is enough."""
    found = []
    for batch, rows in _by_batch(report["rows"]):
        short, full = rows[0], rows[-1]
        values = (
            (f"share of copy bandwidth at {full['length']}", share(report, full), BANDWIDTH_SHARE, True),
            (
                f"time of torch at {full['length']}",
                full["milliseconds"] / full["torch_milliseconds"],
                SLOWER_THAN_TORCH,
                False,
            ),
            (
                f"time at {short['length']} of {full['length']}",
                short["milliseconds"] / full["milliseconds"],
                SHORT_SHARE,
                False,
            ),
        )
        for what, value, bound, at_least in values:
            sign, met = ("≥", value >= bound) if at_least else ("≤", value <= bound)
            found.append({"figure": f"batch {batch}, {what} {sign} {bound}", "value": value, "met": met})
    return found


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
