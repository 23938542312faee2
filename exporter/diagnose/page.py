"""A diagnosis as one HTML page that loads nothing: heat maps of layer × position, and within a wrong layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from exporter.diagnose.difference import Difference
from exporter.diagnose.report import Report
from runtime.bundle import Bundle
from runtime.tokenizer import Tokenizer

TEMPLATE = "page.html.j2"
LEAST, MOST = -8.0, 0.0  # log10 of what is white, and of what is darkest


def page(report: Report, bundle: Bundle) -> str:
    """The page, whole.

    Args:
        report: what was found.
        bundle: whose tokenizer names the positions.
    """
    tokenizer = Tokenizer(bundle)
    maps = [("Side by side, from the tokens on", [(stage.name, stage.difference) for stage in report.stages])]
    alone = [(stage.name, stage.alone) for stage in report.stages if stage.alone is not None]
    maps.append(("Each part alone, on the bundle's own input", alone))
    if report.findings and len(report.findings[0].taps) > 1:
        first = report.findings[0]
        maps.append((f"Within {first.place}, on the bundle's own input", list(first.taps.items())))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files("exporter.diagnose").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(template).render(
        name=bundle.path.resolve().name,
        report=report,
        tokens=[(token, tokenizer.decode([token])) for token in report.tokens],
        maps=[(title, _rows(rows)) for title, rows in maps],
        legend=[(f"1e{power}", colour(10.0**power)) for power in range(int(LEAST), int(MOST) + 1)],
    )


def colour(relative: float) -> str:
    """From white over orange to dark red by the error's order of magnitude; black for what is not finite."""
    if not relative < math.inf:
        return "#000"
    part = min(max((math.log10(max(relative, 1e-30)) - LEAST) / (MOST - LEAST), 0.0), 1.0)
    return f"hsl({50 - 50 * part:.0f} 90% {98 - 63 * part:.0f}%)"


def _rows(rows: Sequence[tuple[str, Difference]]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "difference": found,
            "cells": [(f"{error:.2g}", colour(error)) for error in found.by_position],
        }
        for name, found in rows
    ]
