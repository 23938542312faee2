"""`plan`: what an export would take, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli._console import duration, emit_json, print_facts, print_table, size
from exporter.cli._options import PATH, checkpoint_argument, json_option, memory_option
from exporter.cli.export import KV_CACHES, PRECISIONS, TARGETS, TASKS

if TYPE_CHECKING:
    from exporter.forecast import Estimate, Forecast


@click.command()
@checkpoint_argument
@click.argument("bundle", type=PATH, required=False)
@click.option("--revision", metavar="TEXT", help="Branch, tag or commit, where CHECKPOINT is a hub id.")
@click.option("--task", type=click.Choice(TASKS), help="What it is for.  [default: its architecture's]")
@click.option(
    "--target", type=click.Choice(TARGETS), default="onnxruntime", show_default=True, help="What will run the graph."
)
@click.option("--precision", type=click.Choice(PRECISIONS), help="Of weights and cache.  [default: all of the target]")
@click.option("--recipe", metavar="NAME|FILE", help="How matrices are rounded, where they are.  [default: plain]")
@click.option("--kv-cache", type=click.Choice(KV_CACHES), help="Round the key/value cache to it.")
@memory_option
@click.option("--max-batch-size", type=click.IntRange(min=1), help="Rows that the runtime shall hold.  [default: 1]")
@click.option(
    "--max-seq-len", type=click.IntRange(min=1), help="Tokens of a row that it shall hold.  [default: the model's most]"
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="With the time of the parity gate.")
@json_option
def plan(
    *,
    checkpoint: Path | str,
    bundle: Path | None,
    revision: str | None,
    task: str | None,
    target: str,
    precision: str | None,
    recipe: str | None,
    kv_cache: str | None,
    memory: int | None,
    max_batch_size: int | None,
    max_seq_len: int | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Show what exporting CHECKPOINT would take: sizes, memory, disk and time, by precision.

    Nothing is exported. Sizes follow from the weights' headers; times from what this machine and the disk of BUNDLE
    (default: artifacts/) do in two seconds of measuring.

    \b
    nemotron-export plan ./Nemotron-Mini-4B-Instruct
    nemotron-export plan ./Nemotron-Mini-4B-Instruct --memory 16GiB --max-seq-len 2048
    nemotron-export plan ./Nemotron-Mini-4B-Instruct /data/bundle --target tensorrt --precision fp8 --json
    """
    from exporter.hub import locate
    from exporter.memory import available_memory

    memory = available_memory() if memory is None else memory
    directory = locate(checkpoint, revision)
    from exporter.checkpoint import Checkpoint
    from exporter.forecast import forecast
    from exporter.plan import ExportOptions

    options = ExportOptions(task=task, target=target, recipe=recipe, kv_cache=kv_cache, verify=verify)
    found = forecast(
        Checkpoint.open(directory),
        bundle or Path("artifacts") / "bundle",
        options,
        [precision] if precision else [],
        memory,
        batch=max_batch_size,
        length=max_seq_len,
    )
    if as_json:
        emit_json(found.to_json())
    else:
        print_forecast(found, verify=verify)


def print_forecast(found: Forecast, *, verify: bool) -> None:
    """Print what it takes here, what fits where it runs, and what the times are from."""
    measured = found.measured
    print_facts(
        [
            ("checkpoint", f"{found.checkpoint} ({size(found.checkpoint_bytes)})"),
            ("parameters", f"{found.parameters:,}".replace(",", " ")),
            ("export", f"{found.task} for {found.target}, rows of up to {found.max_length} tokens"),
            ("memory", size(found.memory)),
            ("disk", f"{size(found.free)} free at {found.place}"),
            (
                "measured",
                f"write with fsync {size(measured.write)}/s, read {size(measured.read)}/s, "
                f"sha256 {size(measured.digest)}/s, fp32 products {measured.products / 1e9:.0f} GFLOP/s",
            ),
        ]
    )
    shown = [estimate for estimate in found.precisions if estimate.refused is None]
    click.echo(click.style("to export: size, disk, peak memory without and with the parity gate, time", bold=True))
    head = ("precision", "bundle", "disk", "unchecked", "by layers", "whole", "convert", "time")
    print_table([head, *(_export_row(estimate, found) for estimate in shown)])
    if any(estimate.fit for estimate in shown):
        click.echo(click.style(f"to run: what fits {size(found.memory)} beside the weights", bold=True))
        print_table([_run_head(shown), *(_run_row(estimate) for estimate in shown)])
    for estimate in found.precisions:
        if estimate.refused is not None:
            click.echo(f"{estimate.precision} is refused: {estimate.refused}")
    click.echo(
        f"time: conversion, disk and products as measured{'' if verify else ', without the gate'}; a start of 12 s is "
        "taken for granted"
    )


def _export_row(estimate: Estimate, found: Forecast) -> tuple[str, ...]:
    def fitting(count: int) -> str:
        return size(count) + (" !" if count > found.memory else "")

    return (
        estimate.precision,
        size(estimate.bundle),
        size(estimate.disk) + (" !" if estimate.disk > found.free else ""),
        *map(fitting, (estimate.peak, estimate.peak_layered, estimate.peak_whole)),
        f"{found.measured.converted[estimate.precision] / 1e6:.0f} M/s",
        duration(sum((estimate.seconds or {}).values())),
    )


def _run_head(shown: list[Estimate]) -> tuple[str, ...]:
    fit = next(estimate.fit for estimate in shown if estimate.fit)
    return "precision", "cache per token", f"rows of {fit.length} tokens", f"tokens in {_rows(fit.rows)}"


def _run_row(estimate: Estimate) -> tuple[str, ...]:
    fit = estimate.fit
    assert fit is not None
    per_token = size(estimate.cache_per_token)
    return estimate.precision, per_token, str(fit.batch or "none"), str(fit.longest or "none")


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"each of {count} rows"
