"""What a head needs, and what is refused: options a graph does not carry, heads that are not there, wrong labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import write_checkpoint
from refusals import assert_tells, snapshot
from safetensors.torch import load_file, save_file
from transformers import NemotronConfig

from exporter.export import ExportOptions, export
from exporter.tasks import CARRIED, TASKS, GraphForm, check_form
from runtime.errors import UserError

FORMS = {
    "--inputs embeds": GraphForm(embeds=True),
    "--position-ids": GraphForm(position_ids=True),
    "--output-hidden-states": GraphForm(hidden_states=True),
    "--output-attentions": GraphForm(attentions=True),
}
REFUSED = [
    (target, kind, option)
    for target, options in CARRIED.items()
    for option, kinds in options.items()
    for kind in sorted({kind for row in CARRIED["onnxruntime"].values() for kind in row} - set(kinds))
]


def test_every_class_of_transformers_is_a_task() -> None:
    classes = {
        name for name in dir(transformers) if name.startswith("Nemotron") and name.partition("For")[0] == "Nemotron"
    } | {"NemotronModel"}
    assert {task.architecture for task in TASKS.values()} == classes


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_tasks_head_is_the_modules_of_transformers(task: Any) -> None:
    with torch.device("meta"):
        model = task.build(NemotronConfig(hidden_size=64, num_hidden_layers=1, num_key_value_heads=48, vocab_size=97))
    heads = {name for name, _ in model.named_children()} - {model.base_model_prefix, "dropout"}
    base = {"embed_tokens", "layers", "norm", "rotary_emb"}
    assert heads == (base if task.head is None else {task.head})


@pytest.mark.parametrize(("target", "kind", "option"), REFUSED)
def test_an_option_that_a_graph_does_not_carry_is_refused(target: str, kind: str, option: str) -> None:
    task = "text-generation" if kind.startswith("text generation") else "question-answering"
    form = FORMS[option].__class__(**{**vars(FORMS[option]), "cache": kind.endswith("with a cache")})
    with pytest.raises(UserError) as refused:
        check_form(form, task, target)
    assert_tells(refused.value, option, target, kind)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "c", architecture="NemotronForSequenceClassification", num_labels=3)


@pytest.mark.parametrize("task", ["text-generation", "question-answering"])
def test_a_head_whose_weights_are_not_there_is_never_made_up(untraced, classifier: Path, task: str) -> None:
    before = snapshot(classifier.parent)
    with pytest.raises(UserError) as refused:
        export(classifier, classifier.parent / "b", ExportOptions(task=task))
    assert_tells(refused.value, classifier, TASKS[task].head, task, "--task text-classification")
    assert snapshot(classifier.parent) == before


def test_a_checkpoint_that_says_nothing_of_its_class_is_taken_for_text_generation(untraced, classifier: Path) -> None:
    edit(classifier, lambda config: config.pop("architectures"))
    with pytest.raises(UserError) as refused:
        export(classifier, classifier.parent / "b", ExportOptions())
    assert_tells(refused.value, "lm_head.weight")


def test_a_class_that_is_none_of_ours_is_refused_with_those_that_are(untraced, classifier: Path) -> None:
    edit(classifier, lambda config: config.update(architectures=["NemotronForPoetry"]))
    with pytest.raises(UserError) as refused:
        export(classifier, classifier.parent / "b", ExportOptions())
    assert_tells(refused.value, "NemotronForPoetry", *(task.architecture for task in TASKS.values()))


def test_a_cache_is_of_text_generation(untraced, classifier: Path) -> None:
    with pytest.raises(UserError) as refused:
        export(classifier, classifier.parent / "b", ExportOptions(cache=True))
    assert_tells(refused.value, "cache", "text-generation", "text-classification")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"id2label": {"0": "a", "1": "b"}, "label2id": None}, ["score.weight", "[3, 64]", "[2, 64]"]),
        ({"id2label": {"0": "a", "2": "b"}}, ["id2label"]),
        ({"id2label": ["a", "b", "c"]}, ["id2label"]),
        ({"num_labels": 4}, ["id2label", "num_labels", 3, 4]),
        ({"label2id": {"a": 0}}, ["label2id", "id2label"]),
        ({"pad_token_id": 97}, ["pad_token_id", 97]),
    ],
    ids=["fewer than the head", "a gap", "a list", "another count", "another inverse", "padding beyond the vocabulary"],
)
def test_labels_that_contradict_the_weights_are_refused(
    untraced, classifier: Path, change: dict[str, Any], named: list[object]
) -> None:
    edit(classifier, lambda config: config.update(id2label={"0": "a", "1": "b", "2": "c"}, label2id=None))
    edit(classifier, lambda config: config.update(change))
    with pytest.raises(UserError) as refused:
        export(classifier, classifier.parent / "b", ExportOptions())
    assert_tells(refused.value, *named)


def test_a_question_answering_checkpoint_keeps_its_own_names(untraced, tmp_path: Path) -> None:
    """Its base model is called `transformer` there: a missing weight is told by that name."""
    checkpoint = write_checkpoint(tmp_path / "c", architecture="NemotronForQuestionAnswering")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["transformer.layers.1.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as refused:
        export(checkpoint, tmp_path / "b", ExportOptions())
    assert_tells(refused.value, "transformer.layers.1.mlp.up_proj.weight")


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
