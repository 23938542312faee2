"""`bench`: how fast a bundle is here, and how fast it could be."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli._console import emit_json, note, print_facts, print_table, size, stages
from exporter.cli._options import PATH, backend_options, json_option

if TYPE_CHECKING:
    from runtime.bench import Report, Spread
    from runtime.text_generation import TextGenerator

PROMPT, NEW = 512, 64


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--prompt-tokens",
    "prompts",
    type=click.IntRange(min=1),
    multiple=True,
    help=f"Tokens of a prompt; repeatable.  [default: {PROMPT}, or what a row holds]",
)
@click.option(
    "--batch-size",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    default=(1,),
    show_default=True,
    help="Rows at once; repeatable.",
)
@click.option(
    "--new-tokens", type=click.IntRange(min=2), default=NEW, show_default=True, help="Tokens that each row is given."
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=5, show_default=True, help="How often everything is measured."
)
@backend_options
@json_option
def bench(
    *,
    bundle: Path,
    prompts: tuple[int, ...],
    batches: tuple[int, ...],
    new_tokens: int,
    rounds: int,
    backend: str,
    device: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how fast BUNDLE generates text here: time to the first token, tokens per second, memory.

    Each batch size is measured with each length of prompt, greedily, by random tokens; a round of all of them ahead
    of the others is not counted. Beside it stands the roofline: the tokens per second that reading the weights and
    the cache once per step allows, at the bandwidth that the same run measures.

    \b
    nemotron-export bench ./bundle
    nemotron-export bench ./bundle --prompt-tokens 32 --prompt-tokens 2048 --batch-size 1 --batch-size 8
    """
    from runtime import load
    from runtime.bench import Case
    from runtime.bench import bench as measure
    from runtime.hardware import process_age

    start_s = process_age()
    model = load(bundle, task="text-generation", backend=backend, device=device, threads=threads)
    lengths = prompts or (max(1, min(PROMPT, model.max_length - new_tokens)),)
    cases = [Case(batch, length) for batch, length in product(batches, lengths)]
    for remark in model.remarks:
        note(remark)
    with stages() as progress:
        report = measure(
            *(model, cases),
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            progress=lambda done, total: progress("bench", done, total),
        )
    if as_json:
        emit_json(_to_json(model, report, start_s))
    else:
        _print(model, report, start_s)
        click.echo(f"{new_tokens} new tokens a row; medians of {rounds} rounds (least–most)")


def _to_json(model: TextGenerator, report: Report, start_s: float | None) -> dict[str, object]:
    return {
        "schema": 1,
        "bundle": str(model.bundle.path),
        "backend": model.backend,
        "device": model.device,
        "start": {
            "imports_s": start_s,
            "load_s": model.load_s - model.check_s,
            "check_s": model.check_s,
            "first_token_s": report.cold_s,
        },
        "bandwidth_bytes_per_s": report.bandwidth,
        "peak_rss_mb": report.peak_bytes / 1e6,
        "speeds": [speed.to_json() for speed in report.speeds],
    }


def _print(model: TextGenerator, report: Report, start_s: float | None) -> None:
    manifest = model.bundle.manifest
    print_facts(
        [
            ("bundle", f"{model.bundle.path} ({manifest.target}, {manifest.precision})"),
            ("runs on", f"{model.backend}, {model.device}"),
            ("start", _start(model, report, start_s)),
            ("memory", f"{size(report.peak_bytes)} at its peak"),
            ("bandwidth", report.bandwidth and f"{size(report.bandwidth)}/s of memory read"),
        ]
    )
    head = ("batch", "prompt", "first token", "prompt tokens/s", "tokens/s", "read per step", "roofline", "share")
    rows = [head]
    for speed in report.speeds:
        case = speed.case
        prompt_speed = case.batch * case.prompt_tokens / speed.first_token_s.median
        rows.append(
            (
                *(str(case.batch), str(case.prompt_tokens), _seconds(speed.first_token_s), f"{prompt_speed:.0f}"),
                _rate(speed.tokens_per_s),
                "-" if speed.step_bytes is None else size(speed.step_bytes),
                "-" if speed.roofline is None else f"{speed.roofline:.1f} tokens/s",
                "-" if speed.share is None else f"{100 * speed.share:.0f} %",
            )
        )
    print_table(rows)


def _start(model: TextGenerator, report: Report, start_s: float | None) -> str:
    """From the command to the first token, by part."""
    parts = [("load", model.load_s - model.check_s), ("check", model.check_s), ("first token", report.cold_s)]
    if start_s is not None:
        parts.insert(0, ("imports", start_s))
    total = sum(seconds for _, seconds in parts)
    return f"{total:.2f} s: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts)


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.3f} s ({spread.least:.3f}–{spread.most:.3f})"


def _rate(spread: Spread) -> str:
    return f"{spread.median:.1f} ({spread.least:.1f}–{spread.most:.1f})"
