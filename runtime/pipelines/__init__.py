"""Bundles called as Hugging Face pipelines are: the same tasks, arguments and shapes of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

if TYPE_CHECKING:
    from runtime.pipelines.base import Pipeline
    from runtime.pipelines.feature_extraction import FeatureExtractionPipeline
    from runtime.pipelines.question_answering import QuestionAnsweringPipeline
    from runtime.pipelines.text_classification import TextClassificationPipeline
    from runtime.pipelines.text_generation import TextGenerationPipeline
    from runtime.pipelines.token_classification import TokenClassificationPipeline

_ALIASES = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
_DEVICES: dict[object, str] = {-1: "cpu", 0: "cuda", "cuda:0": "cuda"}  # transformers' spellings of ours


@overload
def pipeline(task: Literal["text-generation"], model: str | Path, **arguments: Any) -> TextGenerationPipeline: ...
@overload
def pipeline(task: Literal["feature-extraction"], model: str | Path, **arguments: Any) -> FeatureExtractionPipeline: ...
@overload
def pipeline(
    task: Literal["text-classification", "sentiment-analysis"], model: str | Path, **arguments: Any
) -> TextClassificationPipeline: ...
@overload
def pipeline(
    task: Literal["token-classification", "ner"], model: str | Path, **arguments: Any
) -> TokenClassificationPipeline: ...
@overload
def pipeline(task: Literal["question-answering"], model: str | Path, **arguments: Any) -> QuestionAnsweringPipeline: ...
@overload
def pipeline(task: str | Path | None = None, model: str | Path | None = None, **arguments: Any) -> Any: ...
def pipeline(
    task: str | Path | None = None,
    model: str | Path | None = None,
    *,
    backend: str = "auto",
    device: str | int | None = None,
    threads: int | None = None,
    **arguments: Any,
) -> Any:
    """A bundle to be called as transformers' pipeline of the same task is.

    >>> pipe = pipeline("text-generation", "./bundle")  # or pipeline(model="./bundle"), or pipeline("./bundle")
    >>> pipe("Our solar system is", max_new_tokens=64, do_sample=False)[0]["generated_text"]

    Args:
        task: of the bundle, by transformers' name or alias (default: the bundle's own). A bundle alone may stand here.
        model: the bundle's directory.
        backend, device, threads: where it runs, see `runtime.Placement`; a device also as transformers spells it.
        arguments: of each call that does not say otherwise; see the pipeline of the task.

    Returns:
        The task's pipeline; its `model` is what `runtime.load` returns.

    Raises:
        UserError: no bundle, one of another task, an unknown task or argument, or what `runtime.load` refuses.
        CheckFailed: what the bundle computes here is not the exported model.
    """
    from runtime import load
    from runtime.bundle import Bundle
    from runtime.errors import UserError

    kinds = _pipelines()
    if model is None and task is not None and str(task) not in (*kinds, *_ALIASES):
        task, model = None, task
    if model is None:
        raise UserError('there is no bundle; give its directory: pipeline("text-generation", "./bundle")')
    wanted = None if task is None else _ALIASES.get(str(task), str(task))
    if wanted is not None and wanted not in kinds:
        raise UserError(f"unknown task {wanted!r}; known: {', '.join((*kinds, *_ALIASES))}")
    found = Bundle.open(model).manifest.task
    if found not in kinds:
        raise UserError(f"{model} is for {found!r}; known: {', '.join(kinds)}")
    if wanted not in (None, found):
        raise UserError(f"{model} is for {found}, not {wanted}; leave the task out, or export with --task {wanted}")
    kind = kinds[found]
    kind.check(arguments)  # ahead of loading, which may take a while
    placement: dict[str, Any] = {"backend": backend, "device": _DEVICES.get(device, device), "threads": threads}
    return kind(load(model, **placement), **arguments)


def _pipelines() -> dict[str, type[Pipeline[Any]]]:
    from runtime.pipelines.feature_extraction import FeatureExtractionPipeline
    from runtime.pipelines.question_answering import QuestionAnsweringPipeline
    from runtime.pipelines.text_classification import TextClassificationPipeline
    from runtime.pipelines.text_generation import TextGenerationPipeline
    from runtime.pipelines.token_classification import TokenClassificationPipeline

    known: tuple[type[Pipeline[Any]], ...] = (
        TextGenerationPipeline,
        FeatureExtractionPipeline,
        TextClassificationPipeline,
        TokenClassificationPipeline,
        QuestionAnsweringPipeline,
    )
    return {kind.task: kind for kind in known}
