"""`compare`: bundles side by side: size, what their precision costs, and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli._console import emit_json, note, size, writing
from exporter.cli._options import PATH, json_option

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.measured import Quality

NEW_TOKENS = 64
PROMPT_TOKENS = 8
NOTHING = "-"


@dataclass
class Row:
    """What is shown of one bundle.

    Attributes:
        name: the directory's name, or the path as given where two bundles share it.
        model_bytes: of the graph and its weights.
        tokens_per_s: of greedy decoding, a row by itself; None where it was not measured.
        backend: what decoded.
        notes: what is missing, and why.
    """

    name: str
    bundle: Bundle
    model_bytes: int
    tokens_per_s: float | None = None
    backend: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def quality(self) -> Quality | None:
        """As `export` measured it."""
        return self.bundle.manifest.quality

    def to_json(self) -> dict[str, Any]:
        """One of the `bundles` of the command's JSON object."""
        manifest = self.bundle.manifest
        return {
            "name": self.name,
            "path": str(self.bundle.path),
            "source": manifest.source.to_json(),
            "task": manifest.task,
            "target": manifest.target,
            "precision": manifest.precision,
            "model_bytes": self.model_bytes,
            "quality": self.quality and self.quality.to_json(),
            "tokens_per_s": self.tokens_per_s,
            "backend": self.backend,
            "notes": self.notes,
        }


@click.command()
@click.argument("bundles", type=PATH, nargs=-1, required=True, metavar="BUNDLE...")
@click.option("--no-speed", is_flag=True, help=f"Do not run the bundles; else each decodes {NEW_TOKENS} tokens.")
@click.option("--plot", type=PATH, metavar="FILE.svg|.png", help="Plot size against mean KL divergence to this file.")
@json_option
def compare(bundles: tuple[Path, ...], no_speed: bool, plot: Path | None, as_json: bool) -> None:
    """Show BUNDLEs side by side: size, quality as `export` measured it, and speed here. Needs no torch.

    KL is the divergence of the next token's distribution from transformers in fp32 (mean and 99th percentile,
    nats), top1 how often both find the same token most likely.

    \b
    nemotron-export compare ./fp32 ./fp16
    nemotron-export compare ./fp16 ./int4 --no-speed --plot sizes.svg
    """
    from runtime.bundle import Bundle

    if plot is not None:
        from exporter.cli._picture import check_plot

        check_plot(plot)
    rows = _rows([Bundle.open(path) for path in bundles])
    for row in rows:
        if row.quality is None:
            row.notes.append("has no quality record; nemotron-export export at a precision below fp32 measures it")
    left_out = [] if plot is None else _plot(rows, plot)
    if not no_speed:
        for row in rows:
            _measure_speed(row)
    if as_json:
        emit_json({"schema": 1, "bundles": [row.to_json() for row in rows]})
    else:
        _print(rows)
    for remark in (*(f"{row.name}: {text}" for row in rows for text in row.notes), *_differences(rows)):
        note(remark)
    for name in left_out:
        note(f"{name}: not in the plot, it has no mean KL above 0")
    if plot is not None:
        note(f"wrote {plot}")


def _rows(bundles: Sequence[Bundle]) -> list[Row]:
    from runtime.manifest import MODEL

    names = [bundle.path.resolve().name for bundle in bundles]
    rows = []
    for name, bundle in zip(names, bundles, strict=True):
        files = bundle.manifest.files
        weight = sum(files[part].bytes for part in (MODEL, f"{MODEL}.data") if part in files)
        rows.append(Row(name if names.count(name) == 1 else str(bundle.path), bundle, weight))
    return rows


def _plot(rows: Sequence[Row], path: Path) -> list[str]:
    """Draw the picture; return the names that are not in it."""
    from exporter.cli._plot import Point, draw

    points = [Point(row.name, row.model_bytes, row.quality.kl_mean if row.quality else None) for row in rows]
    with writing(path):
        return draw(points, path)


def _measure_speed(row: Row) -> None:
    """Decode greedily with whatever runs the bundle here; a note where nothing does."""
    from runtime import load
    from runtime.errors import UserError

    try:
        model = load(row.bundle.path, task="text-generation")
        # Which tokens does not matter for the time they take.
        prompt = [token % row.bundle.vocab_size for token in range(min(PROMPT_TOKENS, model.max_length))]
        result = model.generate([prompt], max_new_tokens=NEW_TOKENS, greedy=True, ignore_eos=True)
    except UserError as error:
        row.notes.append(f"speed not measured: {error}")
        return
    row.tokens_per_s, row.backend = result.timing.decode_tokens_per_s, result.backend
    if row.tokens_per_s is None:
        row.notes.append(f"speed not measured: its rows hold {model.max_length} tokens, too few to decode")


def _differences(rows: Sequence[Row]) -> list[str]:
    """What makes figures of these bundles hard to compare."""
    found = []
    sources = {row.bundle.manifest.source.fingerprint: row.bundle.manifest.source.name for row in rows}
    if len(sources) > 1:
        named = ", ".join(f"{name} ({fingerprint[:12]})" for fingerprint, name in sources.items())
        found.append(f"the bundles are of different checkpoints, each measured against its own: {named}")
    texts = {(row.quality.text, row.quality.tokens) for row in rows if row.quality}
    if len(texts) > 1:
        named = ", ".join(f"{tokens} tokens of {text}" for text, tokens in sorted(texts))
        found.append(f"quality was measured on different texts: {named}")
    return found


def _print(rows: Sequence[Row]) -> None:
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name", overflow="fold")
    table.add_column("target")
    table.add_column("precision")
    for title in ("size", "perplexity", "KL mean", "KL p99", "top1", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        manifest = row.bundle.manifest
        shown = (row.name, manifest.target, manifest.precision, size(row.model_bytes), *_figures(row.quality))
        speed = NOTHING if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}"
        table.add_row(*map(Text, (*shown, speed)))
    # A file or pipe has no width to fit into.
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 1000).print(table)


def _figures(quality: Quality | None) -> tuple[str, str, str, str]:
    if quality is None:
        return (NOTHING,) * 4
    return f"{quality.perplexity:.3f}", f"{quality.kl_mean:.2e}", f"{quality.kl_p99:.2e}", f"{100 * quality.top1:.1f} %"
