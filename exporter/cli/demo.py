"""`demo`: the whole path on the small checkpoint that comes with the package."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from exporter.cli._console import note, stages, writing
from exporter.cli._options import PATH
from exporter.cli.export import print_export
from exporter.cli.generate import stream_text, summary
from exporter.embedded import NAME, embedded_checkpoint

PROMPT = "Complete the paragraph: our solar system is"


@click.command()
@click.argument("bundle", type=PATH, required=False)
@click.option("--force", is_flag=True, help="Replace the bundle that is there (nothing but a bundle).")
def demo(bundle: Path | None, force: bool) -> None:
    """Export, check and run the small Nemotron that comes along.

    The bundle is temporary unless BUNDLE says where to keep it.

    \b
    nemotron-export demo
    nemotron-export demo ./bundle && nemotron-export chat ./bundle
    """
    from exporter.export import ExportOptions, export
    from runtime import load

    checkpoint = embedded_checkpoint()
    with _destination(bundle) as destination, writing(destination):
        here = checkpoint.is_relative_to(Path.cwd())
        click.echo(f"{click.style('export', bold=True)} {checkpoint.relative_to(Path.cwd()) if here else checkpoint}")
        with stages() as progress:
            result = export(checkpoint, destination, ExportOptions(force=force), progress)
        print_export(result)
        click.echo(click.style(f"\n{PROMPT}", bold=True), nl=False)
        generation = load(destination, task="text-generation").stream(PROMPT, max_new_tokens=160, greedy=True)
        stream_text(generation)
        note(summary(generation.result()))
        if bundle is not None:
            click.echo(f"next: nemotron-export chat {bundle}")


@contextmanager
def _destination(bundle: Path | None) -> Iterator[Path]:
    """Where the bundle goes: the given place, or a temporary one."""
    import tempfile

    if bundle is not None:
        yield bundle
        return
    with tempfile.TemporaryDirectory(prefix="nemotron-export-demo-") as directory:
        yield Path(directory) / NAME
