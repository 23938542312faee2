"""`verify`: a bundle against the checkpoint it was made from."""

from __future__ import annotations

from pathlib import Path

import click

from exporter.cli._console import emit_json, print_comparisons, stages
from exporter.cli._options import ATTENTIONS, PATH, checkpoint_argument, checkpoint_options, json_option, memory_option


@click.command()
@click.argument("bundle", type=PATH)
@checkpoint_argument
@checkpoint_options
@click.option("--network", is_flag=True, help="Check what TensorRT's parser makes of the graph; needs no GPU.")
@click.option(
    "--attention",
    type=click.Choice(ATTENTIONS),
    default="native",
    show_default=True,
    help="plugin: check the graph that build --attention plugin makes.",
)
@memory_option
@json_option
def verify(
    *,
    bundle: Path,
    checkpoint: Path | str,
    revision: str | None,
    adapter: Path | None,
    network: bool,
    attention: str,
    memory: int | None,
    as_json: bool,
) -> None:
    """Compare BUNDLE with CHECKPOINT as transformers runs it.

    Logits, cache and greedy tokens are compared; exit code 1 where they differ. On a machine without torch,
    `selftest` checks the bundle by itself. With --network, the graph of a bundle for TensorRT is parsed and mended as
    `build` does it, and the network is evaluated layer by layer, every tensor rounded to its type. With --attention
    plugin, the graph with the kernels' ops is evaluated, each by its reference; with both, TensorRT's network of it.

    \b
    nemotron-export verify ./bundle ./Nemotron-Mini-4B-Instruct
    nemotron-export verify ./bundle ./Nemotron-Mini-4B-Instruct --network
    nemotron-export verify ./bundle ./Nemotron-Mini-4B-Instruct --attention plugin
    """
    from exporter.hub import locate
    from runtime.bundle import Bundle
    from runtime.errors import CheckFailed

    Bundle.open(bundle)  # before torch is imported
    directory = locate(checkpoint, revision)
    from exporter.verify import verify as compare

    with stages() as progress:
        parity = compare(
            bundle, directory, progress, network=network, attention=attention, adapter=adapter, memory=memory
        )
    if as_json:
        emit_json(parity.report())
    else:
        print_comparisons(parity.comparisons)
    failed = sum(not comparison.passed for comparison in parity.comparisons)
    if not parity.passed:
        raise CheckFailed(
            f"{bundle} differs from {checkpoint} in {failed} of {len(parity.comparisons)} comparisons on "
            f"{parity.evaluated_by}; export it again, and check that it is that checkpoint's"
        )
    if not as_json:
        click.echo(f"passed: {bundle} is {checkpoint}, on {parity.evaluated_by}")
