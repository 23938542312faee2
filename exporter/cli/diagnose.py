"""`diagnose`: where a bundle first differs from its checkpoint, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli._console import emit_json, note, print_table, stages, writing
from exporter.cli._options import (
    PATH,
    TokenIds,
    checked_text,
    checkpoint_argument,
    checkpoint_options,
    json_option,
    takes_file,
)

if TYPE_CHECKING:
    from exporter.diagnose.difference import Difference
    from exporter.diagnose.report import Report
    from runtime.bundle import Bundle

NOTHING = "-"


@click.command()
@click.argument("bundle", type=PATH)
@checkpoint_argument
@click.option("-p", "--prompt", metavar="TEXT", help="What both read.  [default: a sentence of the parity gate's]")
@click.option("--ids", type=TokenIds(), metavar="5,17,3", help="Token ids that both read, instead of text.")
@checkpoint_options
@click.option("--network", is_flag=True, help="Look at what TensorRT's parser makes of the graph; needs no GPU.")
@click.option("--html", type=PATH, metavar="FILE", help="Write a page with a heat map of layers and positions.")
@json_option
def diagnose(
    *,
    bundle: Path,
    checkpoint: Path | str,
    prompt: str | None,
    ids: list[int] | None,
    revision: str | None,
    adapter: Path | None,
    network: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Find the first layer of BUNDLE that differs from CHECKPOINT as transformers runs it, and the bug behind it.

    Both read one row, layer by layer. `alone` is a layer's own error: transformers' layer is given the
    bundle's input, so that what is wrong is told from what inherits. In a wrong layer the first value that differs is
    named, and a cause where the bundle gives just what that bug gives. Exit code 1 where a difference is found.

    \b
    nemotron-export diagnose ./bundle ./Nemotron-Mini-4B-Instruct
    nemotron-export diagnose ./bundle ./Nemotron-Mini-4B-Instruct -p "The Sun is" --html page.html
    """
    if prompt is not None and ids is not None:
        raise click.UsageError("give -p TEXT or --ids 5,17,3, and not both")
    text = None if prompt is None else checked_text(prompt, "the prompt")
    if html is not None:
        _check_place(html)
    from exporter.hub import locate
    from runtime.bundle import Bundle
    from runtime.errors import CheckFailed

    opened = Bundle.open(bundle)  # before torch is imported
    directory = locate(checkpoint, revision)
    from exporter.checkpoint import Checkpoint
    from exporter.diagnose.run import diagnose as compare

    with stages() as progress:
        tokens = _tokens(opened, text, ids)
        report = compare(opened, Checkpoint.open(directory, adapter), tokens, progress, network=network)
    if as_json:
        emit_json(report.to_json())
    else:
        _print(report)
    if html is not None:
        from exporter.diagnose.page import page

        with writing(html):
            html.write_text(page(report, opened), encoding="utf-8")
        note(f"wrote {html}")
    if not report.passed:
        raise CheckFailed(f"{bundle} differs from {checkpoint}: {report.findings[0].told()}")
    if not as_json:
        click.echo(f"no difference: {bundle} is {checkpoint}, on {report.evaluated_by}")


def _check_place(path: Path) -> None:
    """Refuse a page's destination before minutes of work."""
    from runtime.errors import UserError

    if not takes_file(path):
        what = "is a directory" if path.is_dir() else f"cannot be written, {path.parent} is not a directory"
        raise UserError(f"{path} {what}; give --html a file in a directory that exists")


def _tokens(bundle: Bundle, text: str | None, ids: list[int] | None) -> list[int]:
    """What is given, or a sentence as far as it fits."""
    from exporter.verify_rows import prompts
    from runtime.tokenizer import Tokenizer

    if ids is not None:
        return ids
    return Tokenizer(bundle).encode(text) if text is not None else prompts(bundle)[0][: bundle.manifest.max_length]


def _print(report: Report) -> None:
    """A line for each part of the model; then each that is wrong by itself, value by value."""
    rows = [("", "max", "relative", "cosine", "alone", "limit", "")]
    for stage in report.stages:
        alone = stage.alone
        rows.append(
            (
                stage.name,
                *_figures(stage.difference),
                NOTHING if alone is None else f"{alone.relative:.2g}",
                NOTHING if alone is None else _limit(alone),
                "not judged" if alone is None else _verdict(report, stage.name),
            )
        )
    print_table(rows)
    for index, finding in enumerate(report.findings):
        click.echo(click.style(f"{'first' if not index else 'then'}: {finding.told()}", bold=True))
        if index or len(finding.taps) < 2:
            continue
        told = (
            (tap, *_figures(found), f"limit {_limit(found)}", "ok" if found.passed else "DIFFERS")
            for tap, found in finding.taps.items()
        )
        print_table([("", "max", "relative", "cosine", "", ""), *told])


def _verdict(report: Report, name: str) -> str:
    return "DIFFERS" if any(finding.place == name for finding in report.findings) else "ok"


def _figures(found: Difference) -> tuple[str, str, str]:
    return f"{found.max_abs:.3g}", f"{found.relative:.2g}", f"{found.cosine:.7f}"


def _limit(found: Difference) -> str:
    """Relative, as what it limits."""
    return NOTHING if found.limit is None else f"{found.limit / found.size:.2g}"
