"""Files that pictures go to: checked before any work is done, and written alike each time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from exporter.cli._options import takes_file
from exporter.cli._requirements import remedy_for
from runtime.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png")


def check_plot(path: Path) -> None:
    """Refuse a file that could not be drawn, before any work is done.

    Raises:
        UserError: another suffix, no such directory, a directory, or matplotlib is not installed.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"cannot plot to {path}; give a file that ends in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise UserError(f"cannot plot to {path}, a directory; give a file in it")
    if not takes_file(path):
        raise UserError(f"cannot plot to {path}; give a file in a directory that is there")
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"matplotlib is not installed; {remedy_for('matplotlib')}") from error


def save(figure: Figure, path: Path) -> None:
    """Write a figure; text stays text in SVG, and the same figures give the same bytes."""
    from matplotlib import rc_context

    vector = path.suffix.lower() == ".svg"
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemotron-export"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if vector else None)
