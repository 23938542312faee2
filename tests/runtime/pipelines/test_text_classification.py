"""The oracle is transformers' own pipeline over the same toy."""

from pathlib import Path
from typing import Any

import pytest
from forward_bundles import Toy
from toy_pipelines import assert_same, transformers_pipeline

from runtime import pipeline
from runtime.errors import UserError

TEXTS = ["the sun is a star", "mars", "the moon is cold"]
NAMES = {"0": "red", "1": "green", "2": "blue"}
CALLS: list[dict[str, Any]] = [
    {},
    {"top_k": None},
    {"top_k": 1},
    {"top_k": 2},
    {"function_to_apply": "sigmoid", "top_k": None},
    {"function_to_apply": "none"},
]


@pytest.mark.parametrize("own", [{}, {"top_k": 2}, {"top_k": None}], ids=str)
@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_classes_come_in_the_shapes_of_transformers(problem: str | None, own: Any, tmp_path: Path) -> None:
    """One text or several, `top_k` of the call, of the pipeline or of neither: each has another shape."""
    toy = Toy("text-classification", config={"problem_type": problem, "id2label": NAMES})
    path = toy.write(tmp_path / "toy")
    ours, theirs = pipeline("text-classification", path, **own), transformers_pipeline(toy, path, **own)
    for inputs in (TEXTS[0], TEXTS[:1], TEXTS):
        for arguments in CALLS:
            assert_same(ours(inputs, **arguments), theirs(inputs, **arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k should be at least 1, or None for all classes; found 0"),
        ({"function_to_apply": "tanh"}, "unknown function_to_apply 'tanh'; known: softmax, sigmoid, none"),
        ({"return_all_scores": True}, "does not take return_all_scores; known: batch_size, function_to_apply, top_k"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, message: str, tmp_path: Path) -> None:
    pipe = pipeline(Toy("text-classification").write(tmp_path / "toy"))
    with pytest.raises(UserError, match=message):
        pipe("mars", **arguments)
