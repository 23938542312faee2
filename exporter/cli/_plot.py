"""Size against divergence, as a picture: what `compare --plot` draws with matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from exporter.cli._requirements import remedy_for
from runtime.errors import UserError

SUFFIXES = (".svg", ".png")


class Point(NamedTuple):
    """A bundle: its name, the bytes of graph and weights, and its mean KL in nats; None where nobody measured it."""

    name: str
    bytes: int
    kl_mean: float | None


def check_plot(path: Path) -> None:
    """Refuse a file that could not be drawn, before any work is done.

    Raises:
        UserError: another suffix, no such directory, a directory, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot plot to {path}; give a file that ends in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"cannot plot to {path}, a directory; give a file in it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot plot to {path}; give a file in a directory that is there")
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"matplotlib is not installed; {remedy_for('matplotlib')}") from error


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
    from matplotlib import rc_context
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
    # Text stays text, and the same figures give the same bytes.
    vector = path.suffix.lower() == ".svg"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemotron-export"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if vector else None)
    return [point.name for point in points if not point.kl_mean]
