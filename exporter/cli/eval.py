"""`eval`: benchmarks of lm-evaluation-harness on a bundle, with the checkpoint's own numbers beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from exporter.cli._console import emit_json, note, print_table, stages, writing
from exporter.cli._options import PATH, backend_options, checkpoint_options, json_option, reference_option, takes_file

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint
    from exporter.harness.evaluation import Evaluation, Progress
    from exporter.harness.report import Figure, Metric, TaskReport
    from runtime.bundle import Bundle

F = TypeVar("F", bound=Callable[..., Any])

NOTHING = "-"


class Names(click.ParamType[tuple[str, ...]]):
    """Names separated by commas."""

    name = "a,b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Split them."""
        names = tuple(name.strip() for name in str(value).split(","))
        if not all(names):
            self.fail(f"{value!r} is not a list of names such as mmlu,hellaswag", param, ctx)
        return names


class Pairs(click.ParamType[dict[str, Any]]):
    """Names and values separated by commas."""

    name = "name=value,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        """Read them: a number or true or false where a value is that, else text."""
        if isinstance(value, dict):
            return value
        pairs: dict[str, Any] = {}
        for pair in str(value).split(","):
            name, equals, text = pair.partition("=")
            if not equals or not name.strip():
                self.fail(f"{pair!r} is not a setting such as max_gen_toks=64", param, ctx)
            try:
                pairs[name.strip()] = json.loads(text.lower())
            except json.JSONDecodeError:
                pairs[name.strip()] = text
        return pairs


def _task_options(command: F) -> F:
    for option in reversed(
        (
            click.option("--tasks", type=Names(), multiple=True, required=True, help="What to run; repeatable."),
            click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples before each question."),
            click.option(
                "--limit",
                type=click.FloatRange(min=0, min_open=True),
                help="Documents of each task; below 1 a part of them.",
            ),
            click.option(
                "--batch-size",
                type=click.IntRange(min=1),
                default=8,
                show_default=True,
                help="Rows that run at once, at most.",
            ),
            click.option("--max-length", type=int, help="Tokens of a row.  [default and maximum: the bundle's]"),
            click.option("--gen-kwargs", type=Pairs(), default={}, help="For tasks that generate: temperature, …"),
            click.option("--apply-chat-template", is_flag=True, help="Put questions into the bundle's chat template."),
            click.option(
                "--include-path",
                type=PATH,
                multiple=True,
                metavar="DIR",
                help="Task files of your own; repeatable. Code that they name is run.",
            ),
            click.option(
                "--run-generated-code", is_flag=True, help="Allow tasks that run what the model wrote (humaneval)."
            ),
        )
    ):
        command = option(command)
    return command


@click.command("eval")
@click.argument("bundle", type=PATH)
@_task_options
@reference_option
@checkpoint_options
@click.option(
    "--reference-dtype",
    type=click.Choice(("fp32", "bf16", "fp16")),
    default="fp32",
    show_default=True,
    help="What transformers computes in.",
)
@backend_options
@click.option("--output", type=PATH, metavar="FILE", help="Write the JSON object to this file, too.")
@json_option
def evaluate(
    *,
    bundle: Path,
    reference: Path | str | None,
    revision: str | None,
    adapter: Path | None,
    reference_dtype: str,
    backend: str,
    device: str | None,
    threads: int | None,
    output: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Ask BUNDLE the questions of lm-evaluation-harness. Needs no torch without --reference.

    Tasks are lm-eval's, its groups, patterns such as 'mmlu_*', or your own. minitron-4b stands for what was published
    of Minitron-4B, with the published numbers beside. With --reference the checkpoint is asked the same on
    transformers: both numbers are shown, and of how many documents the answers differ.

    \b
    nemotron-export eval ./bundle --tasks minitron-4b
    nemotron-export eval ./bundle --tasks mmlu,arc_challenge --num-fewshot 5 --limit 100
    nemotron-export eval ./int4 --tasks hellaswag --reference ./Minitron-4B-Base
    """
    from runtime.bundle import Bundle

    opened = Bundle.open(bundle)
    opened.check_task("text-generation")
    _check_options(reference, revision, adapter, output)
    _quieten()
    from exporter.harness.evaluation import evaluate_bundle
    from exporter.harness.run import Settings
    from exporter.harness.tasks import select

    asked = ("num_fewshot", "limit", "apply_chat_template", "gen_kwargs", "run_generated_code")
    settings = Settings(*(flags[name] for name in asked))
    names = [name for group in flags["tasks"] for name in group]
    with stages() as progress:
        progress("tasks", 0, 1)
        selection = select(names, flags["include_path"], run_code=settings.run_code)
        beside = None if reference is None else _checkpoint(opened, reference, revision, adapter, progress)
        found = evaluate_bundle(
            *(bundle, selection, settings, progress),
            rows=flags["batch_size"],
            max_length=flags["max_length"],
            checkpoint=beside,
            dtype=reference_dtype,
            backend=backend,
            device=device,
            threads=threads,
        )
    _tell(found, output, as_json)


def _check_options(
    reference: Path | str | None, revision: str | None, adapter: Path | None, output: Path | None
) -> None:
    for name, value in (("--revision", revision), ("--adapter", adapter)):
        if value is not None and reference is None:
            raise click.UsageError(f"{name} is of the checkpoint; give that with --reference, or drop {name}")
    if output is not None and not takes_file(output):
        raise click.UsageError(f"cannot write to {output}; give a file in a directory that is there")


def _quieten() -> None:
    """Keep lm-eval's bars and remarks off the terminal, where our own are; what ends a run is said by its error."""
    import logging
    import os

    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _checkpoint(
    bundle: Bundle, reference: Path | str, revision: str | None, adapter: Path | None, progress: Progress
) -> Checkpoint:
    """The checkpoint to ask the same, once it is known to be the bundle's."""
    from exporter.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(reference, adapter, revision=revision)
    from exporter.harness.reference import check_same_weights

    check_same_weights(bundle, checkpoint, progress)
    return checkpoint


def _tell(found: Evaluation, output: Path | None, as_json: bool) -> None:
    report = found.to_json()
    if output is not None:
        with writing(output):
            output.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    if as_json:
        emit_json(report)
        return
    for remark in found.remarks:
        note(remark)
    print_table(list(_rows(found)), indent="")
    for item in found.not_run:
        click.echo(f"not run: {item.published.task} (published {item.published.value:.3f}): {item.reason}")
    if found.tokens.asked:
        note(f"{found.tokens.asked} tokens asked for, {found.tokens.computed} computed, on {found.backend}")


def _rows(found: Evaluation) -> Iterator[tuple[str, ...]]:
    """The table: a line for each metric of what was asked for, with the columns that there is something for."""
    shown = [task for task in found.tasks if task.asked]
    metrics = [metric for task in shown for metric in task.metrics]
    published = any(metric.published is not None for metric in metrics)
    compared = found.reference is not None
    yield (
        *("task", "shots", "documents", "metric", "bundle"),
        *(("transformers", "difference", "answers differ") if compared else ()),
        *(("published",) if published else ()),
    )
    for task in shown:
        for metric in task.metrics:
            yield (
                *(task.name, _text(task.shots), _text(task.documents), _name(metric), _figure(metric.ours)),
                *(_compared(task, metric) if compared else ()),
                *((NOTHING if metric.published is None else f"{metric.published:.3f}",) if published else ()),
            )


def _compared(task: TaskReport, metric: Metric) -> tuple[str, str, str]:
    difference = NOTHING if metric.difference is None else f"{metric.difference:+.4f}"
    agreement = task.agreement
    differ = NOTHING if agreement is None else f"{agreement.different} of {agreement.documents}"
    return _figure(metric.reference), difference, differ


def _name(metric: Metric) -> str:
    return metric.name if metric.answers == "none" else f"{metric.name} ({metric.answers})"


def _figure(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return NOTHING
    return f"{figure.value:.4f}" if figure.stderr is None else f"{figure.value:.4f} ± {figure.stderr:.4f}"


def _text(value: int | None) -> str:
    return NOTHING if value is None else str(value)
