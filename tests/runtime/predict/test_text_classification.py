"""The oracles are numpy for the logits, and the postprocessing of transformers' own pipeline."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from forward_bundles import Toy

from runtime import load
from runtime.errors import UserError

TEXTS = ["the sun is a star", "mars", "the moon is cold"]
NAMES = {"0": "red", "1": "green", "2": "blue"}


def pipeline_scores(logits: np.ndarray, config: dict[str, Any]) -> list[dict[str, Any]]:
    pipeline = object.__new__(transformers.TextClassificationPipeline)
    pipeline.model = SimpleNamespace(config=transformers.NemotronConfig(**config))
    return pipeline.postprocess({"logits": torch.tensor(logits)[None]}, top_k=None, _legacy=False)


@pytest.mark.parametrize("pad", [3, None])
@pytest.mark.parametrize("problem", [None, "single_label_classification", "multi_label_classification", "regression"])
def test_labels_and_scores_are_those_of_transformers(problem: str | None, pad: int | None, tmp_path: Path) -> None:
    toy = Toy("text-classification", pad_token_id=pad, config={"problem_type": problem, "id2label": NAMES})
    model = load(toy.write(tmp_path / "toy", golden=True), task="text-classification")
    for text, result in zip(TEXTS, model.classify(TEXTS), strict=True):
        expected = pipeline_scores(toy.logits(model.tokenizer.encode(text))[-1], toy.config)
        assert [row.label for row in result.labels] == [row["label"] for row in expected]
        np.testing.assert_allclose([row.score for row in result.labels], [row["score"] for row in expected], atol=1e-5)
    assert json.loads(json.dumps(result.to_json()))["labels"][0]["label"] in NAMES.values()


@pytest.mark.parametrize("problem", [None, "regression"])
def test_one_label_is_scored_as_transformers_does(problem: str | None, tmp_path: Path) -> None:
    toy = Toy("text-classification", labels=1, config={"problem_type": problem, "num_labels": 1})
    model = load(toy.write(tmp_path / "toy"), task="text-classification")
    (row,) = model.classify("mars")[0].labels
    (expected,) = pipeline_scores(toy.logits(model.tokenizer.encode("mars"))[-1], toy.config)
    assert row.label == expected["label"] == "LABEL_0"
    np.testing.assert_allclose(row.score, expected["score"], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({"id2label": None, "num_labels": 3}, ["LABEL_0", "LABEL_1", "LABEL_2"]),
        ({"id2label": {"2": "c", "0": "a", "1": "b"}}, ["a", "b", "c"]),
    ],
)
def test_labels_come_from_the_configuration(config: dict[str, Any], labels: list[str], tmp_path: Path) -> None:
    assert load(Toy("text-classification", config=config).write(tmp_path / "toy")).labels == labels


def test_a_checkpoint_that_says_nothing_has_two_labels_as_in_transformers(tmp_path: Path) -> None:
    toy = Toy("text-classification", labels=2, config={"id2label": None})
    assert transformers.NemotronConfig().num_labels == 2
    assert load(toy.write(tmp_path / "toy")).labels == ["LABEL_0", "LABEL_1"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "names 2 labels, its graph has 3; correct id2label"),
        ({"num_labels": 4}, "names 4 labels, its graph has 3; correct id2label"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "should have the keys 0 to 2, found 1, 2, 3; correct"),
        ({"id2label": ["a", "b", "c"]}, "id2label should be an object, found"),
    ],
)
def test_labels_that_are_not_the_graphs_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as error:
        load(Toy("text-classification", config=config).write(tmp_path / "toy"))
    assert "\n" not in str(error.value)
