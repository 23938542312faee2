"""Speeds as a picture: what `bench --plot` draws with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.cli._bench_table import OURS
from exporter.cli._picture import save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from exporter.bench.report import Speed, Spread
    from exporter.bench.run import Report

_GROUP = 0.6  # of the room that a case has
_MARKERS = "osD^v*"


def draw(report: Report, title: str, path: Path) -> None:
    """Three panels, a colour for each contender: prompts and decoding by case, and memory.

    Points are medians, with their spread; a line above those of decoding is the roofline of what is read there.
    """
    from matplotlib.figure import Figure

    named = [(OURS, report.speeds, report.peak_bytes)]
    named += [(peer.contender.name, peer.speeds, peer.peak_bytes) for peer in report.peers]
    cases = [f"{speed.case.batch} × {speed.case.prompt_tokens}" for speed in report.speeds]
    wide = max(3.6, 1.0 + 0.25 * len(cases) * (1 + len(named)))
    figure = Figure(figsize=(2 * wide + 2.6, 4.6), layout="constrained")
    prompts, decoding, memory = figure.subplots(1, 3, width_ratios=[wide, wide, 2.2])
    for number, (name, speeds, peak) in enumerate(named):
        shift = (number - (len(named) - 1) / 2) * _GROUP / len(named)
        _points(prompts, number, shift, speeds, lambda speed: speed.prompt_tokens_per_s)
        _points(decoding, number, shift, speeds, lambda speed: speed.tokens_per_s)
        _rooflines(decoding, shift, _GROUP / len(named), speeds)
        memory.bar(number, peak / 1e6, color=f"C{number}", label=name)
    prompts.set_ylabel("tokens of prompts a second")
    decoding.set_ylabel("new tokens a second, after the first")
    memory.set_ylabel("memory at its peak (MB)")
    memory.set_xticks([])
    for axes in (prompts, decoding):
        _numbered(axes)
        axes.set_xticks(range(len(cases)), cases)
        axes.set_xlim(-0.5, len(cases) - 0.5)
        axes.set_xlabel("rows × tokens of each prompt")
    for axes in (prompts, decoding, memory):
        axes.grid(visible=True, axis="y", which="both", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(title, fontsize="medium", parse_math=False)
    handles, labels = memory.get_legend_handles_labels()
    lines, told = decoding.get_legend_handles_labels()
    figure.legend([*handles, *lines[:1]], [*labels, *told[:1]], loc="outside lower center", ncols=len(named) + 1)
    save(figure, path)


def _points(
    axes: Axes, number: int, shift: float, speeds: Sequence[Speed], figure: Callable[[Speed], Spread | None]
) -> None:
    found = [(at + shift, spread) for at, speed in enumerate(speeds) if (spread := figure(speed)) is not None]
    medians = [spread.median for _, spread in found]
    beyond = [
        [spread.median - spread.least for _, spread in found],
        [spread.most - spread.median for _, spread in found],
    ]
    marker = _MARKERS[number % len(_MARKERS)]
    axes.errorbar([at for at, _ in found], medians, beyond, fmt=marker, color=f"C{number}", capsize=3, elinewidth=1)


def _rooflines(axes: Axes, shift: float, width: float, speeds: Sequence[Speed]) -> None:
    found = [(at + shift, speed.roofline) for at, speed in enumerate(speeds) if speed.roofline is not None]
    if found:
        left, right = ([at + side * width / 2 for at, _ in found] for side in (-1, 1))
        axes.hlines([height for _, height in found], left, right, color="black", linewidth=1.5, label="roofline")


def _numbered(axes: Axes) -> None:
    """A logarithmic axis with numbers as people write them."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    least, most = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most / least > 10 else range(1, 10)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
