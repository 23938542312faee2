"""`build`: a bundle's graph becomes a TensorRT engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli._console import emit_json, note, print_facts, size, stages, writing
from exporter.cli._options import ATTENTIONS, PATH, json_option

if TYPE_CHECKING:
    from exporter.engine import BuildResult

# Plain text, so that --help needs no import; a test holds them against what the builder knows.
FLAVORS = ("tensorrt", "tensorrt-rtx")
CAUSALITIES = ("lower-right", "mask")
HARDWARE_COMPATIBILITY = ("ampere-plus", "same-compute-capability")
PROFILING_VERBOSITY = ("layer-names", "detailed", "none")


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--flavor", type=click.Choice(FLAVORS), required=True, help="Which of the two TensorRTs.")
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    metavar="8.9",
    help="GPU to build for; tensorrt-rtx takes several.  [default: the one here]",
)
@click.option("--max-batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Most rows of a step.")
@click.option(
    "--max-input-len", type=click.IntRange(min=1), help="Most tokens of a row in a step.  [default: 1024 at most]"
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(min=1),
    help="Tokens a row may hold: the cache's capacity.  [default: 4096 at most; maximum: the bundle's]",
)
@click.option(
    "--attention",
    type=click.Choice(ATTENTIONS),
    default="native",
    show_default=True,
    help="TensorRT's layers, or our kernels, whose cost follows the length and not the capacity (tensorrt).",
)
@click.option(
    "--causality",
    type=click.Choice(CAUSALITIES),
    default="lower-right",
    show_default=True,
    help="How attention sees the past alone; mask assumes nothing undocumented.",
)
@click.option("--optimization-level", type=click.IntRange(0, 5), help="Build time for speed.  [default: TensorRT's]")
@click.option(
    "--hardware-compatibility", type=click.Choice(HARDWARE_COMPATIBILITY), help="Run on other GPUs too (tensorrt)."
)
@click.option("--version-compatible", is_flag=True, help="Run on later versions too (tensorrt).")
@click.option("--weight-streaming", is_flag=True, help="Let weights stay in host memory at run time.")
@click.option("--strip", is_flag=True, help="Leave the weights out of the engine.")
@click.option("--profiling-verbosity", type=click.Choice(PROFILING_VERBOSITY), help="What profilers see of layers.")
@click.option("--timing-cache", type=PATH, help="File that remembers measured kernels (tensorrt).")
@click.option("--force", is_flag=True, help="Replace the engine that is there.")
@json_option
def build(*, bundle: Path, as_json: bool, **options: Any) -> None:
    """Build a TensorRT engine of BUNDLE, which was exported with --target tensorrt, and put it there.

    Flavor tensorrt builds on the GPU that will run it; tensorrt-rtx builds for any GPU on any machine. Needs no
    torch. With --attention plugin it needs the extra kernels, whose Triton compiles them; the engine does not.

    \b
    nemotron-export build ./bundle --flavor tensorrt
    nemotron-export build ./bundle --flavor tensorrt-rtx --compute-capability 8.9 --max-seq-len 2048
    """
    from runtime.bundle import Bundle
    from runtime.tensorrt_api import import_tensorrt

    Bundle.open(bundle)
    import_tensorrt(options["flavor"])  # its extra brings what the builder imports
    from exporter.engine import build as run
    from exporter.engine_options import BuildOptions

    with writing(bundle), stages() as progress:
        result = run(bundle, BuildOptions(**options), progress)
    for warning in result.warnings:
        note(f"TensorRT warns: {warning}")
    if as_json:
        emit_json(result.to_json())
    else:
        _print_build(result)
        click.echo(f"next: nemotron-export selftest {bundle} --backend {result.engine.flavor}")


def _print_build(result: BuildResult) -> None:
    """Print what was built, for what, and what it assumes."""
    engine = result.engine
    print_facts(
        [
            ("engine", f"{result.bundle / engine.path} ({size(result.plan_bytes)})"),
            ("built by", f"{engine.flavor} {engine.version}"),
            ("runs on", f"compute capability {', '.join(engine.capabilities)}"),
            ("step", f"{engine.max_batch_size} × {engine.max_input_len} tokens at most"),
            ("capacity", f"{engine.max_seq_len} tokens a row"),
            ("layers", ", ".join(f"{count} {kind}" for kind, count in result.layers.items())),
            ("attention", "" if engine.attention == "native" else f"{engine.attention}, compiled into the engine"),
            ("flags", ", ".join(engine.flags)),
            ("assumes", ", ".join(engine.assumptions)),
            ("seconds", f"{result.seconds:.1f}"),
            ("peak memory", size(result.peak_rss_mb * 1e6)),
        ]
    )
