"""`export`: a checkpoint becomes a bundle."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import click

from exporter.cli._console import (
    describe_calibration,
    emit_json,
    note,
    print_comparisons,
    print_facts,
    size,
    stages,
    writing,
)
from exporter.cli._options import PATH, checkpoint_argument, checkpoint_options, json_option, memory_option
from exporter.cli._process import collect_rarely

if TYPE_CHECKING:
    from exporter.export import ExportResult
    from exporter.plan import ExportOptions

# Plain text, so that --help needs no import; a test holds them against what the exporter knows.
TASKS = (
    "text-generation",
    "feature-extraction",
    "text-classification",
    "token-classification",
    "question-answering",
)
TARGETS = ("onnxruntime", "tensorrt")
KV_CACHES = ("int8",)
PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
INPUTS = ("ids", "embeds")
WEIGHTS = ("copy", "link")


@click.command()
@checkpoint_argument
@click.argument("bundle", type=PATH, required=False)
@checkpoint_options
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
    "--recipe",
    metavar="NAME|FILE",
    help="How matrices are rounded: plain, fine, compact, mixed, aware, balanced, or a .toml file.  [default: plain]",
)
@click.option(
    "--kv-cache",
    type=click.Choice(KV_CACHES),
    help="Round the key/value cache to it.  [default: the activations' dtype]",
)
@click.option(
    "--calibration", type=PATH, help="Text to choose scales, codes and ranges by.  [default: calibration.txt]"
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(min=2),
    default=16384,
    show_default=True,
    help="Tokens of it to run.",
)
@click.option("--calibration-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which of them.")
@click.option(
    "--fp16-safe/--no-fp16-safe",
    default=True,
    show_default=True,
    help="Scale what would leave fp16's range on the calibration text, the function unchanged.",
)
@click.option("--eval-text", type=PATH, help="Text to measure the precision's cost on.  [default: heldout.txt]")
@click.option(
    "--eval-tokens", type=click.IntRange(min=2), default=4096, show_default=True, help="Tokens of it to measure on."
)
@click.option("--max-kl", type=click.FloatRange(min=0), help="Largest mean KL divergence from fp32, in nats.")
@click.option(
    "--max-perplexity-increase", type=click.FloatRange(min=0), help="Largest rise of perplexity over fp32, in percent."
)
@click.option(
    "--max-length",
    type=click.IntRange(min=1),
    help="Tokens a row may hold, prompt included.  [default: max_position_embeddings; more where the rope type scales]",
)
@click.option("--no-cache", is_flag=True, help="Text generation without a key/value cache: every run is of whole rows.")
@click.option(
    "--inputs",
    type=click.Choice(INPUTS),
    default="ids",
    show_default=True,
    help="What goes in: token ids, or embeddings in place of them.",
)
@click.option("--position-ids", is_flag=True, help="Take the tokens' positions as an input.")
@click.option("--output-hidden-states", is_flag=True, help="Hand out what goes into each layer, and the final norm.")
@click.option("--output-attentions", is_flag=True, help="Hand out each layer's attention weights (without a cache).")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check the export against transformers.")
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="copy",
    show_default=True,
    help="Write them, or link the checkpoint's own files, at the precision that it is stored in.",
)
@memory_option
@click.option("--force", is_flag=True, help="Replace the bundle that is there (nothing but a bundle).")
@json_option
def export(
    *,
    checkpoint: Path | str,
    bundle: Path | None,
    revision: str | None,
    no_cache: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Export CHECKPOINT, a Hugging Face directory or hub id, to BUNDLE.

    The export is compared with transformers before it gets its name; where it differs, no bundle is left and
    the exit code is 1. BUNDLE is artifacts/<checkpoint>-<target>-<precision> unless given.

    \b
    nemotron-export export ./Nemotron-Mini-4B-Instruct
    nemotron-export export nvidia/Nemotron-Mini-4B-Instruct --adapter ./my-lora
    nemotron-export export ./Nemotron-Mini-4B-Instruct ./bundle --max-length 2048 --force
    nemotron-export export ./Minitron-4B-Base ./features --task feature-extraction
    """
    from exporter.hub import locate
    from exporter.preflight import check_room
    from exporter.staging import check_destination

    if bundle is not None:
        check_destination(bundle, chosen["force"])  # as the exporter does, but before torch is imported
    directory = locate(checkpoint, revision)
    asked = cast("ExportOptions", SimpleNamespace(**chosen))  # whose module would load torch
    check_room(directory, bundle or Path("artifacts") / "bundle", asked)
    collect_rarely()
    from exporter.export import ExportOptions
    from exporter.export import export as run

    options = ExportOptions(cache=False if no_cache else None, **chosen)
    with writing(bundle or Path("artifacts")), stages() as progress:
        result = run(directory, bundle, options, progress, room_checked=True)
    if not chosen["verify"]:
        note("not compared with transformers (--no-verify): the bundle has no golden cases")
    if as_json:
        emit_json(result.to_json())
    else:
        print_export(result)
        generates = result.manifest.task == "text-generation"
        command, option = ("generate", "-p") if generates else ("predict", "--text")
        click.echo(f"next: nemotron-export {command} {result.bundle} {option} TEXT")


def print_export(result: ExportResult) -> None:
    """Print what was made, how long it took, and how close it is to transformers."""
    manifest = result.manifest
    print_facts(
        [
            ("bundle", f"{result.bundle} ({size(sum(file.bytes for file in manifest.files.values()))})"),
            ("passes", ", ".join(f"{record.name} ×{record.count}" for record in manifest.passes)),
            ("attention", manifest.lowering.attention if manifest.lowering else None),
            ("cache", manifest.kv_cache),
            ("calibration", describe_calibration(manifest.calibration)),
            ("fallbacks", "; ".join(manifest.lowering.fallbacks) if manifest.lowering else None),
            ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in result.seconds.items())),
            ("peak memory", size(result.peak_rss_mb * 1e6)),
            ("parity", f"passed on {manifest.parity.evaluated_by}" if manifest.parity else "not checked"),
        ]
    )
    if manifest.parity:
        print_comparisons(manifest.parity.comparisons)
    if (quality := manifest.quality) is not None:
        click.echo(
            f"quality on {quality.tokens} tokens of {quality.text}: perplexity {quality.perplexity:.4f} "
            f"({quality.perplexity_increase:+.2f} %), KL mean {quality.kl_mean:.2e}, p99 {quality.kl_p99:.2e}, "
            f"same token {100 * quality.top1:.1f} %"
        )
