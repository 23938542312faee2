"""Which pipeline a bundle becomes, and what is refused before anything runs."""

from pathlib import Path
from typing import Any

import pytest
from forward_bundles import Toy

import runtime
from runtime import pipeline
from runtime.errors import UserError


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return Toy("text-classification").write(tmp_path / "toy")


@pytest.mark.parametrize(
    ("task", "alias", "name"),
    [
        ("feature-extraction", "feature-extraction", "FeatureExtractionPipeline"),
        ("text-classification", "sentiment-analysis", "TextClassificationPipeline"),
        ("token-classification", "ner", "TokenClassificationPipeline"),
        ("question-answering", "question-answering", "QuestionAnsweringPipeline"),
    ],
)
def test_a_bundle_is_called_by_its_task_an_alias_or_neither(task: str, alias: str, name: str, tmp_path: Path) -> None:
    path = Toy(task).write(tmp_path / "toy")
    for pipe in (
        pipeline(task, path),
        pipeline(task, model=str(path)),
        pipeline(task=alias, model=path),
        pipeline(model=path),
        pipeline(path),
        pipeline(str(path)),
    ):
        assert (type(pipe).__name__, pipe.task) == (name, task)


def test_text_generation_is_one_too_and_the_function_stays_one(bundle_dir: Path) -> None:
    assert type(pipeline(bundle_dir)).__name__ == "TextGenerationPipeline"
    assert callable(runtime.pipeline)


@pytest.mark.parametrize("device", ["cpu", -1])
def test_where_it_runs_may_be_said_as_for_transformers(device: Any, classifier: Path) -> None:
    assert pipeline(model=classifier, device=device, threads=1).model.backend == "onnxruntime-cpu"


@pytest.mark.parametrize(
    ("task", "model", "arguments", "message"),
    [
        ("text-generation", True, {}, "is for text-classification, not text-generation; leave the task out"),
        ("ner", True, {}, "is for text-classification, not token-classification; leave the task out"),
        ("summarization", True, {}, "unknown task 'summarization'; known: text-generation, feature-extraction"),
        ("text-classification", False, {}, "there is no bundle; give its directory"),
        (None, False, {}, "there is no bundle; give its directory"),
        ("./nothing-here", False, {}, "nothing-here"),
        (None, True, {"dtype": "float16"}, "text-classification does not take dtype; known: batch_size, function_to"),
        (None, True, {"device": "tpu"}, "unknown device 'tpu'; known: cpu, cuda"),
    ],
)
def test_what_cannot_be_is_one_line_that_says_what_can(
    task: Any, model: bool, arguments: dict[str, Any], message: str, classifier: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        pipeline(task, classifier if model else None, **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("task", ["feature-extraction", "text-classification", "token-classification"])
@pytest.mark.parametrize("inputs", [{"text": "a", "text_pair": "b"}, [["a", "b"]], 3, None])
def test_inputs_that_are_no_texts_are_named(task: str, inputs: Any, tmp_path: Path) -> None:
    pipe = pipeline(Toy(task).write(tmp_path / "toy"))
    with pytest.raises(UserError, match=r"inputs should be a text or a list of texts; found (dict|list|int|NoneType)"):
        pipe(inputs)
    with pytest.raises(UserError, match=f"{task} does not take truncation, padding; known: "):
        pipe("mars", truncation=True, padding=True)
