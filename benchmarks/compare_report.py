"""What `benchmarks.compare` writes: JSON, a table, and a picture of speed beside what memory allows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exporter.cli._picture import save

SPEEDS = ("decode", "batch", "long")
MARKERS = "osD^v*"


def roofline(bandwidth: float, step: int, rows: int) -> float:
    """Tokens a second of all rows, if a step took no longer than to read its bytes."""
    return rows * bandwidth / step


def row_of(
    numbers: Mapping[str, list[float]], bandwidth: float, steps: Mapping[str, tuple[int, int]]
) -> dict[str, Any]:
    """Medians of a contender's numbers, and the share of the roofline that its speeds have.

    Args:
        numbers: by measure, see `benchmarks.reach.Samples`.
        bandwidth: bytes a second.
        steps: rows and bytes of a step, by the measure of its speed.
    """
    medians = {name: statistics.median(found) for name, found in numbers.items()}
    shares = {
        name: round(medians[name] / roofline(bandwidth, size, rows), 3)
        for name, (rows, size) in steps.items()
        if name in medians
    }
    return {
        "medians": {name: round(value, 4) for name, value in medians.items()},
        "roofline_share": shares,
        "rounds": {name: [round(value, 5) for value in found] for name, found in numbers.items() if len(found) > 1},
    }


def table(report: Mapping[str, Any]) -> str:
    """Contenders in rows, then the figures with what they reached."""
    return "\n".join((*_contenders(report), "", *_figures(report)))


def _contenders(report: Mapping[str, Any]) -> Iterator[str]:
    machine = report["machine"]
    yield (
        f"{report['preset']}, {machine['cpu']}, {machine['cores']} cores, read {machine['read_gb_s']:.1f} GB/s, "
        f"medians of {report['rounds']} rounds"
    )
    yield (
        f"{'':30}{'tok/s':>8}{'share':>7}{'first s':>9}{'batch 8':>9}{'far on':>8}"
        f"{'step MB':>9}{'resident':>9}{'peak':>7}{'start s':>8}{'first':>7}"
    )
    for name, row in report["contenders"].items():
        medians, shares = row["medians"], row["roofline_share"]
        megabytes = {key: medians[key] / 1e6 for key in ("step_bytes", "resident", "peak")}
        agreement = row["agreement"]
        yield (
            f"{name:30}{medians['decode']:8.1f}{shares['decode']:7.0%}{medians['first_token']:9.2f}"
            f"{_number(medians.get('batch'), 9)}{_number(medians.get('long'), 8)}"
            f"{megabytes['step_bytes']:9.0f}{megabytes['resident']:9.0f}{megabytes['peak']:7.0f}{medians['start']:8.1f}"
            + ("–" if agreement is None else f"{agreement:.0%}").rjust(7)
        )
    for peer, why in report["not_run"].items():
        yield f"{peer}: not run: {why}"


def _figures(report: Mapping[str, Any]) -> Iterator[str]:
    for found in report["figures"]:
        if found["met"] is None:
            yield f"not measured  {found['figure']}"
            continue
        value = found["value"]
        shown = f"{value / 1e6:.0f} MB" if found["bound"] > 1e6 else f"{value:.2f}"
        yield f"{'met' if found['met'] else 'MISSED':14}{found['figure']}: {shown}"


def _number(value: float | None, width: int) -> str:
    return f"{value:{width}.1f}" if value is not None else "–".rjust(width)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Bytes of a step (MB) against tokens a second, under the roofline; both logarithmic, a marker for each peer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.add_subplot()
    peers: dict[str, list[tuple[str, float, float]]] = {}
    for name, row in report["contenders"].items():
        peer, _, precision = name.partition(" ")
        medians = row["medians"]
        peers.setdefault(peer, []).append((precision, medians["step_bytes"] / 1e6, medians["decode"]))
    for marker, (peer, points) in zip(MARKERS, peers.items(), strict=False):
        axes.scatter([at for _, at, _ in points], [speed for *_, speed in points], marker=marker, label=peer, zorder=3)
        for precision, at, speed in points:
            axes.annotate(precision, (at, speed), xytext=(6, -3), textcoords="offset points", fontsize="small")
    bandwidth = report["machine"]["read_gb_s"]
    ends = [at for points in peers.values() for _, at, _ in points]
    edges = [min(ends) * 0.8, max(ends) * 1.25]
    axes.plot(edges, [bandwidth * 1e3 / at for at in edges], color="grey", label=f"reading at {bandwidth:.1f} GB/s")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("read by a decode step (MB)")
    axes.set_ylabel("tokens a second, batch 1, after a prompt of 512")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    save(figure, path)
