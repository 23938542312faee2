"""`predict`: what a bundle without a cache says of texts: embeddings, classes, tags or answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli._console import emit_json, note, print_table
from exporter.cli._options import PATH, backend_options, checked_text, json_option

if TYPE_CHECKING:
    from runtime.predict.features import FeatureExtractor
    from runtime.predict.question_answering import QuestionAnswerer
    from runtime.predict.text_classification import TextClassifier
    from runtime.predict.token_classification import TokenClassifier

Predictions = list[dict[str, Any]]

# Options that mean something for some tasks only.
_ONLY = {
    "--context": ("question-answering",),
    "--pooling": ("feature-extraction",),
    "--no-normalize": ("feature-extraction",),
    "--top-k": ("question-answering", "text-classification"),
}


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--text", "texts", multiple=True, required=True, metavar="TEXT", help="Text or question; repeatable.")
@click.option(
    "--context",
    "contexts",
    multiple=True,
    metavar="TEXT",
    help="Where a question is answered: one for all questions, or one for each.",
)
@click.option("--pooling", type=click.Choice(("mean", "last")), help="Tokens an embedding is made of.  [default: mean]")
@click.option("--no-normalize", is_flag=True, help="Leave embeddings at the length they have.")
@click.option(
    "--top-k", type=click.IntRange(min=1), help="Answers, or classes, to show.  [default: 1 answer, all classes]"
)
@backend_options
@json_option
def predict(
    *,
    bundle: Path,
    texts: tuple[str, ...],
    contexts: tuple[str, ...],
    pooling: str | None,
    no_normalize: bool,
    top_k: int | None,
    backend: str,
    device: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Embed, classify or tag texts, or answer questions, with BUNDLE. Needs no torch.

    What is done follows from the bundle's task. Messages go to stderr.

    \b
    nemotron-export predict ./embedder --text "Mars is red." --text "The Sun is a star." --json
    nemotron-export predict ./sentiment --text "Well done."
    nemotron-export predict ./answers --text "What is red?" --context "Mars is red with rust."
    """
    texts = tuple(checked_text(text, f"text {number}") for number, text in enumerate(texts, start=1))
    contexts = tuple(checked_text(text, f"context {number}") for number, text in enumerate(contexts, start=1))

    from runtime import load
    from runtime.bundle import Bundle

    task = Bundle.open(bundle).manifest.task
    given = {"--context": contexts, "--pooling": pooling, "--no-normalize": no_normalize, "--top-k": top_k}
    _check_task(bundle, task, [name for name, value in given.items() if value])
    _check_contexts(task, len(texts), len(contexts))
    model = load(bundle, backend=backend, device=device, threads=threads)
    match task:
        case "feature-extraction":
            predictions = _embed(model, texts, pooling or "mean", not no_normalize)
        case "text-classification":
            predictions = _classify(model, texts, top_k)
        case "token-classification":
            predictions = _tag(model, texts)
        case _:
            predictions = _answer(model, texts, contexts, top_k or 1)
    for remark in model.remarks:
        note(remark)
    if as_json:
        emit_json({"schema": 1, "task": task, "backend": model.backend, "predictions": predictions})
        return
    for number, (text, prediction) in enumerate(zip(texts, predictions, strict=True), start=1):
        click.echo(click.style(f"[{number}] {_shown(text)}", bold=True))
        print_table(_ROWS[task](prediction) or [("nothing",)])
    note(model.backend)


def _check_task(bundle: Path, task: str, given: Sequence[str]) -> None:
    from runtime.errors import UserError

    if task == "text-generation":
        raise UserError(f"{bundle} is for text-generation; use nemotron-export generate")
    for option in given:
        if task not in _ONLY[option]:
            raise UserError(f"{option} is for {' and '.join(_ONLY[option])}, {bundle} is for {task}; leave it out")


def _check_contexts(task: str, texts: int, contexts: int) -> None:
    from runtime.errors import UserError

    if task != "question-answering":
        return
    if not contexts:
        raise UserError("a question needs a text to be answered from; give --context TEXT")
    if contexts not in (1, texts):
        raise UserError(
            f"there are {texts} questions and {contexts} contexts; give one --context, or one for each --text"
        )


def _embed(model: FeatureExtractor, texts: Sequence[str], pooling: Any, normalize: bool) -> Predictions:
    vectors = model.embed(texts, pooling=pooling, normalize=normalize)
    return [{"embedding": [float(value) for value in vector]} for vector in vectors]


def _classify(model: TextClassifier, texts: Sequence[str], top_k: int | None) -> Predictions:
    return [{"labels": result.to_json()["labels"][:top_k]} for result in model.classify(texts)]


def _tag(model: TokenClassifier, texts: Sequence[str]) -> Predictions:
    return [result.to_json() for result in model.tag(texts)]


def _answer(model: QuestionAnswerer, texts: Sequence[str], contexts: Sequence[str], top_k: int) -> Predictions:
    contexts = contexts if len(contexts) == len(texts) else [contexts[0]] * len(texts)
    pairs = zip(texts, contexts, strict=True)
    return [{"answers": [answer.to_json() for answer in model.answer(*pair, top_k=top_k)]} for pair in pairs]


def _spans(spans: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (f"{span['start']}–{span['end']}", *([span["label"]] if "label" in span else []), f"{span['score']:.4f}",
         _shown(span["text"]))
        for span in spans
    ]  # fmt: skip


def _vector(values: Sequence[float]) -> list[tuple[str, ...]]:
    return [(" ".join(f"{value:.4f}" for value in values[:6]), f"… {len(values)} numbers")]


_ROWS: dict[str, Callable[[dict[str, Any]], list[tuple[str, ...]]]] = {
    "feature-extraction": lambda found: _vector(found["embedding"]),
    "text-classification": lambda found: [(row["label"], f"{row['score']:.4f}") for row in found["labels"]],
    "token-classification": lambda found: _spans(found["entities"]),
    "question-answering": lambda found: _spans(found["answers"]),
}


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"
