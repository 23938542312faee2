"""`bench`: how fast a bundle is here, how fast it could be, and how fast others are beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exporter.cli._console import emit_json, note, stages
from exporter.cli._options import PATH, backend_options, json_option

if TYPE_CHECKING:
    from exporter.bench.measure import Case
    from exporter.bench.process import Contender
    from exporter.bench.run import Report
    from runtime.bundle import Bundle
    from runtime.text_generation import TextGenerator

PROMPTS, BATCHES, NEW = (32, 512), (1, 4), 64


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--prompt-tokens",
    "prompts",
    type=click.IntRange(min=1),
    multiple=True,
    help=f"Tokens of a prompt; repeatable.  [default: {' and '.join(map(str, PROMPTS))}, or what a row holds]",
)
@click.option(
    "--batch-size",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    help=f"Rows at once; repeatable.  [default: {' and '.join(map(str, BATCHES))}, or what an engine takes]",
)
@click.option(
    "--new-tokens", type=click.IntRange(min=2), default=NEW, show_default=True, help="Tokens that each row is given."
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="How often everything is measured."
)
@click.option(
    "--against",
    multiple=True,
    metavar="PEER,...",
    help="Measure these in turn with the bundle: transformers, onnxruntime-genai, openvino=DIRECTORY.",
)
@click.option("--checkpoint", type=PATH, help="The bundle's source, which transformers runs.")
@click.option(
    "--peer-python",
    "pythons",
    multiple=True,
    metavar="PEER=PYTHON",
    help="The Python of an environment that has a peer; repeatable.  [default: this one]",
)
@click.option("--plot", type=PATH, metavar="FILE.svg|.png", help="Draw the speeds to this file.")
@backend_options
@json_option
def bench(
    *,
    bundle: Path,
    prompts: tuple[int, ...],
    batches: tuple[int, ...],
    new_tokens: int,
    rounds: int,
    against: tuple[str, ...],
    checkpoint: Path | None,
    pythons: tuple[str, ...],
    plot: Path | None,
    backend: str,
    device: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure how fast BUNDLE generates text here: time to the first token, tokens per second, memory.

    Each batch size is measured with each length of prompt, greedily, by random tokens; a round of all of them ahead
    of the others is not counted. Beside it stands the roofline: the tokens per second that reading the weights and
    the cache once per step allows, at the bandwidth that the same run measures.

    Peers run in processes of their own, stopped but for their turns. In every round each has its turn of the same
    prompts on as many threads; × is how many times as fast the bundle was, in the same round.

    \b
    nemotron-export bench ./bundle
    nemotron-export bench ./bundle --prompt-tokens 32 --prompt-tokens 2048 --batch-size 1 --batch-size 8
    nemotron-export bench ./bundle --against transformers --checkpoint ./Nemotron-Mini-4B --plot speeds.svg
    nemotron-export bench ./bundle --against onnxruntime-genai --peer-python onnxruntime-genai=./genai/bin/python
    """
    from exporter.bench.run import run
    from runtime import load
    from runtime.bundle import Bundle
    from runtime.hardware import process_age

    start_s = process_age()
    if plot is not None:
        from exporter.cli._picture import check_plot

        check_plot(plot)
    opened = Bundle.open(bundle)
    if against:
        threads = threads or _cores()
    peers = _peers(opened, against, pythons, checkpoint, threads)
    model = load(bundle, task="text-generation", backend=backend, device=device, threads=threads)
    if peers:
        _check_device(model)
    for remark in model.remarks:
        note(remark)
    cases = _cases(model, prompts, batches, new_tokens)
    with stages() as progress, _blaming_peers():
        report = run(model, cases, peers, new_tokens=new_tokens, rounds=rounds, threads=threads, progress=progress)
    _tell(model, report, start_s, plot, as_json=as_json)


def _tell(model: TextGenerator, report: Report, start_s: float | None, plot: Path | None, *, as_json: bool) -> None:
    if as_json:
        emit_json(_to_json(model, report, start_s))
    else:
        from exporter.cli._bench_table import print_report

        print_report(model, report, start_s)
    if plot is not None:
        from exporter.cli._bench_plot import draw

        draw(report, f"{model.bundle.path.resolve().name} on {model.device}", plot)
        note(f"wrote {plot}")


def _peers(
    bundle: Bundle, against: tuple[str, ...], pythons: tuple[str, ...], checkpoint: Path | None, threads: int | None
) -> list[Contender]:
    """Those that are asked for; whatever is wrong with one is said before anything is loaded."""
    from exporter.bench.peers import contenders, parse_against, parse_pythons, remarks

    named = parse_against(against)
    found = contenders(
        bundle, named, pythons=parse_pythons(pythons, named), checkpoint=checkpoint, threads=threads or _cores()
    )
    for remark in remarks(bundle, checkpoint):
        note(remark)
    return found


@contextmanager
def _blaming_peers() -> Iterator[None]:
    """Say what to do about a peer that breaks down."""
    from exporter.bench.process import Ended
    from runtime.errors import UserError

    try:
        yield
    except Ended as error:
        raise UserError(f"{error}; mend that, or leave it out of --against") from error


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


def _check_device(model: TextGenerator) -> None:
    from runtime.errors import UserError

    if model.backend != "onnxruntime-cpu":
        raise UserError(
            f"peers run on the CPU, {model.bundle.path} on {model.backend}; add --backend onnxruntime --device cpu, "
            "or drop --against"
        )


def _cases(model: TextGenerator, prompts: tuple[int, ...], batches: tuple[int, ...], new_tokens: int) -> list[Case]:
    from exporter.bench.measure import Case

    most = max(1, model.max_length - new_tokens)
    lengths = prompts or sorted({min(length, most) for length in PROMPTS})
    rows = batches or sorted({min(batch, model.max_slots or batch) for batch in BATCHES})
    return [Case(batch, length) for batch, length in product(dict.fromkeys(rows), dict.fromkeys(lengths))]


def _to_json(model: TextGenerator, report: Report, start_s: float | None) -> dict[str, object]:
    return {
        "schema": 1,
        "bundle": str(model.bundle.path),
        "backend": model.backend,
        "device": model.device,
        "new_tokens": report.new_tokens,
        "rounds": report.rounds,
        "threads": report.threads,
        "start": {
            "imports_s": start_s,
            "load_s": model.load_s - model.check_s,
            "check_s": model.check_s,
            "first_token_s": report.cold_s,
        },
        "bandwidth_bytes_per_s": report.bandwidth,
        "peak_rss_mb": report.peak_bytes / 1e6,
        "speeds": [speed.to_json() for speed in report.speeds],
        "peers": [peer.to_json() for peer in report.peers],
    }
