"""`generate`: a bundle continues prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli._console import emit_json, note
from exporter.cli._options import (
    PATH,
    TokenIds,
    backend_options,
    checked_text,
    generation_options,
    json_option,
    sampling_options,
)

if TYPE_CHECKING:
    from runtime.generate import Generation, GenerationResult


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "-p", "--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue; repeatable: one batch."
)
@click.option(
    "--prompt-ids",
    multiple=True,
    type=TokenIds(),
    metavar="5,17,3",
    help="Token ids to continue, instead of texts; repeatable: one batch.",
)
@click.option("--chat", is_flag=True, help="Each prompt is a user's message, put into the bundle's chat template.")
@sampling_options
@click.option("--ignore-eos", is_flag=True, help="Go on after the tokens that end a text.")
@backend_options
@json_option
def generate(
    *,
    bundle: Path,
    prompts: tuple[str, ...],
    prompt_ids: tuple[list[int], ...],
    chat: bool,
    ignore_eos: bool,
    backend: str,
    device: str | None,
    threads: int | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Continue prompts with BUNDLE. Needs no torch.

    One prompt is streamed; of several, each is printed when it has ended. What is not asked for comes from
    the bundle's generation_config.json. Messages and timing go to stderr.

    \b
    nemotron-export generate ./bundle -p "Complete the paragraph: our solar system is"
    nemotron-export generate ./bundle --chat -p "What is a moon?" --temperature 0.7 --seed 1
    nemotron-export generate ./bundle -p "The Sun is" -p "Mars is" --max-new-tokens 32 --json
    """
    if bool(prompts) == bool(prompt_ids):
        raise click.UsageError("give -p TEXT or --prompt-ids 5,17,3 (each repeatable), and not both")
    if chat and prompt_ids:
        raise click.UsageError("--chat makes prompts of text; give -p TEXT instead of --prompt-ids")
    options = generation_options(flags)
    options["ignore_eos"] = ignore_eos
    texts = [checked_text(text, f"prompt {row}") for row, text in enumerate(prompts, start=1)]

    from runtime import load
    from runtime.hardware import process_age

    start_s = process_age()
    model = load(bundle, task="text-generation", backend=backend, device=device, threads=threads)
    batch: Sequence[str | Sequence[int]] = texts or prompt_ids
    if chat:
        batch = [model.encode_chat([{"role": "user", "content": text}]) for text in texts]
    generation = model.stream(batch, **options)
    for remark in model.remarks:
        note(remark)
    if as_json:
        emit_json(generation.result().to_json())
    elif len(batch) == 1:
        stream_text(generation)
        note(summary(generation.result(), start_s))
    else:
        _print_as_they_end(generation, texts or [",".join(map(str, ids)) for ids in prompt_ids])
        note(summary(generation.result(), start_s))


def stream_text(generation: Generation) -> str:
    """Print the text of a single row as it comes; return it."""
    text = ""
    for event in generation:
        if event.text:
            click.echo(event.text, nl=False)
            text += event.text
    click.echo()
    return text


def summary(result: GenerationResult, start_s: float | None = None) -> str:
    """The line on what was generated, by what, and how fast; `start_s` from the command to loading, where known."""
    rows, timing = result.sequences, result.timing
    reasons = ", ".join(str(row.finish_reason) for row in rows)
    parts = [
        f"{sum(row.prompt_tokens for row in rows)} prompt tokens",
        f"{sum(len(row.token_ids) for row in rows)} new ({reasons})",
        *([f"start {start_s:.2f} s"] if start_s is not None else []),
        f"load {timing.load_s:.2f} s",
        f"first token {timing.ttft_s:.3f} s",
    ]
    if timing.decode_tokens_per_s is not None:
        parts.append(f"{timing.decode_tokens_per_s:.1f} tokens/s")
    return " · ".join([*parts, result.backend])


def _print_as_they_end(generation: Generation, labels: Sequence[str]) -> None:
    texts = [""] * len(labels)
    for event in generation:
        texts[event.row] += event.text
        if event.finish_reason is not None:
            label = " ".join(labels[event.row].split())
            shown = label if len(label) <= 60 else label[:59] + "…"
            click.echo(click.style(f"[{event.row + 1}] {shown}", bold=True))
            click.echo(f"{texts[event.row]}\n")
