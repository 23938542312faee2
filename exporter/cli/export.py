"""`export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli._console import emit_json, note, print_comparisons, print_facts, size, stages, writing
from exporter.cli._options import PATH, checkpoint_argument, json_option

if TYPE_CHECKING:
    from exporter.export import ExportResult

# Plain text, so that --help needs no import; a test holds them against what the exporter knows.
TASKS = ("text-generation",)
TARGETS = ("onnxruntime", "tensorrt")
PRECISIONS = ("fp32", "fp16", "bf16")


@click.command()
@checkpoint_argument
@click.argument("bundle", type=PATH, required=False)
@click.option("--task", type=click.Choice(TASKS), help="What it is for.  [default: its architecture's]")
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="onnxruntime",
    show_default=True,
    help="What will run the graph.",
)
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of weights and cache."
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    help="Tokens a row may hold, prompt included.  [default and maximum: max_position_embeddings]",
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check the export against transformers.")
@click.option("--force", is_flag=True, help="Replace the bundle that is there (nothing but a bundle).")
@json_option
def export(
    *,
    checkpoint: Path,
    bundle: Path | None,
    task: str | None,
    target: str,
    precision: str,
    max_length: int | None,
    verify: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT, a Hugging Face directory, to BUNDLE.

    The export is compared with transformers before it gets its name; where it differs, no bundle is left and
    the exit code is 1. BUNDLE is artifacts/<checkpoint>-<target>-<precision> unless given.

    \b
    nemotron-export export ./Nemotron-Mini-4B-Instruct
    nemotron-export export ./Nemotron-Mini-4B-Instruct ./bundle --max-length 2048 --force
    """
    from exporter.staging import check_destination

    if bundle is not None:
        check_destination(bundle, force)  # as the exporter does, but before torch is imported
    from exporter.export import ExportOptions
    from exporter.export import export as run

    options = ExportOptions(
        task=task, target=target, precision=precision, max_length=max_length, verify=verify, force=force
    )
    with writing(bundle or Path("artifacts")), stages() as progress:
        result = run(checkpoint, bundle, options, progress)
    if not verify:
        note("not compared with transformers (--no-verify): the bundle has no golden cases")
    if as_json:
        emit_json(result.to_json())
    else:
        print_export(result)
        click.echo(f"next: nemotron-export generate {result.bundle} -p TEXT")


def print_export(result: ExportResult) -> None:
    """Print what was made, how long it took, and how close it is to transformers."""
    manifest = result.manifest
    print_facts(
        [
            ("bundle", f"{result.bundle} ({size(sum(file.bytes for file in manifest.files.values()))})"),
            ("passes", ", ".join(f"{record.name} ×{record.count}" for record in manifest.passes)),
            ("attention", manifest.lowering.attention if manifest.lowering else None),
            ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.seconds.items())),
            ("peak memory", size(result.peak_rss_mb * 1e6)),
            ("parity", f"passed on {manifest.parity.evaluated_by}" if manifest.parity else "not checked"),
        ]
    )
    if manifest.parity:
        print_comparisons(manifest.parity.comparisons)
