"""Size against divergence, as a picture: what `compare --plot` draws with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from exporter.cli._picture import save
from runtime.errors import UserError


class Point(NamedTuple):
    """A bundle: its name, the bytes of graph and weights, and its mean KL in nats; None where nobody measured it."""

    name: str
    bytes: int
    kl_mean: float | None


def draw(points: Sequence[Point], path: Path) -> list[str]:
    """Draw size (MB) against mean KL (logarithmic), each point with its name; return the names that have no place.

    Raises:
        UserError: none has a place: no bundle has a quality record with a divergence above 0.
    """
    placed = [(point.name, point.bytes / 1e6, point.kl_mean) for point in points if point.kl_mean]
    if not placed:
        raise UserError(
            "there is nothing to plot: no bundle has a mean KL above 0; export one at a precision below fp32"
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter([at for _, at, _ in placed], [kl for _, _, kl in placed])
    axes.set_yscale("log")
    axes.margins(0.15)
    axes.set_xlabel("model (MB)")
    axes.set_ylabel("mean KL from transformers in fp32 (nats)")
    axes.grid(visible=True, which="both", alpha=0.3)
    middle = sum(axes.get_xlim()) / 2
    for name, at, kl in placed:  # names lie towards the middle, within the frame
        offset, side = (5, "left") if at <= middle else (-5, "right")
        axes.annotate(name, (at, kl), xytext=(offset, 5), textcoords="offset points", ha=side, parse_math=False)
    save(figure, path)
    return [point.name for point in points if not point.kl_mean]
