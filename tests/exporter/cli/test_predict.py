from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from forward_bundles import HIDDEN, Toy
from refusals import assert_tells

from runtime import load
from runtime.errors import UserError

TEXTS = ("the sun is a star", "mars")


@pytest.fixture
def bundle_of(tmp_path: Path):
    return lambda task: Toy(task).write(tmp_path / task, golden=True)


def predictions(cli, *arguments: object) -> tuple[str, list]:
    outcome = cli("predict", *arguments, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert (report["schema"], report["backend"]) == (1, "onnxruntime-cpu")
    assert set(report) == {"schema", "task", "backend", "predictions"}
    return report["task"], report["predictions"]


def texts(*given: str) -> list[str]:
    return [argument for text in given for argument in ("--text", text)]


def test_embeddings_are_those_of_the_library(cli, bundle_of):
    path = bundle_of("feature-extraction")
    model = load(path)
    for flags, options in (
        ([], {}),
        (["--pooling", "last", "--no-normalize"], {"pooling": "last", "normalize": False}),
    ):
        task, found = predictions(cli, path, *texts(*TEXTS), *flags)
        assert task == "feature-extraction"
        np.testing.assert_allclose([row["embedding"] for row in found], model.embed(TEXTS, **options), atol=1e-6)
        assert len(found[0]["embedding"]) == HIDDEN


def test_classes_come_with_their_scores(cli, bundle_of):
    path = bundle_of("text-classification")
    task, found = predictions(cli, path, *texts(*TEXTS))
    assert task == "text-classification"
    assert found == [result.to_json() for result in load(path).classify(TEXTS)]
    _, best = predictions(cli, path, *texts(*TEXTS), "--top-k", 1)
    assert [row["labels"] for row in best] == [row["labels"][:1] for row in found]


def test_tags_come_with_their_characters(cli, bundle_of):
    path = bundle_of("token-classification")
    task, found = predictions(cli, path, *texts(*TEXTS))
    assert task == "token-classification"
    assert found == [result.to_json() for result in load(path).tag(TEXTS)]
    assert [TEXTS[0][tag["start"] : tag["end"]] for tag in found[0]["tokens"]] == TEXTS[0].split()


def test_a_context_answers_every_question_or_each_has_its_own(cli, bundle_of):
    path = bundle_of("question-answering")
    model, contexts = load(path), ("mars is red", "the moon is cold and old")
    task, found = predictions(cli, path, *texts("what is red", "who"), "--context", contexts[0], "--top-k", 2)
    assert task == "question-answering"
    for question, row in zip(("what is red", "who"), found, strict=True):
        assert row["answers"] == [answer.to_json() for answer in model.answer(question, contexts[0], top_k=2)]
    pair = [argument for context in contexts for argument in ("--context", context)]
    _, found = predictions(cli, path, *texts("what is red", "who"), *pair)
    assert [len(row["answers"]) for row in found] == [1, 1]
    assert found[1]["answers"][0] == model.answer("who", contexts[1])[0].to_json()


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("feature-extraction", ["… 8 numbers"]),
        ("text-classification", ["LABEL_0", "LABEL_2"]),
        ("token-classification", ["LABEL_", "0–"]),
        ("question-answering", ["0."]),
    ],
)
def test_people_read_one_block_a_text(cli, bundle_of, task, words):
    context = ["--context", "mars is red"] if task == "question-answering" else []
    outcome = cli("predict", bundle_of(task), *texts("who is \n old", "mars"), *context)
    assert outcome.code == 0
    assert "[1] who is old\n" in outcome.out
    assert "[2] mars\n" in outcome.out
    assert all(word in outcome.out for word in words)
    assert "onnxruntime-cpu" in outcome.err
    assert "exported without the parity gate" in outcome.err


@pytest.mark.parametrize(
    ("task", "arguments", "words"),
    [
        ("question-answering", ["--text", "who"], ["--context TEXT"]),
        (
            "question-answering",
            [*texts("a", "b", "c"), "--context", "x", "--context", "y"],
            ["3 questions", "2 contexts"],
        ),
        ("question-answering", ["--text", "who", "--context", ""], ["context 1 is empty"]),
        ("token-classification", ["--text", ""], ["text 1 is empty"]),
        ("token-classification", ["--text", "mars", "--context", "x"], ["--context is for question-answering"]),
        ("token-classification", ["--text", "mars", "--top-k", "2"], ["--top-k is for question-answering and text-"]),
        ("text-classification", ["--text", "mars", "--pooling", "last"], ["--pooling is for feature-extraction"]),
        ("text-classification", ["--text", "mars", "--no-normalize"], ["--no-normalize is for feature-extraction"]),
        ("feature-extraction", ["--text", "mars " * 40], ["text 1 has 41 tokens", "takes 24"]),
        ("feature-extraction", ["--text", "mars", "--backend", "tensorrt"], ["tensorrt has no engines", "onnxruntime"]),
        ("text-generation", ["--text", "mars"], ["is for text-generation", "nemotron-export generate"]),
    ],
)
def test_what_cannot_be_done_is_one_line_with_a_remedy(cli, tmp_path, task, arguments, words):
    outcome = cli("predict", Toy(task).write(tmp_path / "toy"), *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.count("\n") == 1
    assert_tells(UserError(outcome.err.strip()), *words)


@pytest.mark.parametrize("command", [("generate", "-p", "mars"), ("chat",)])
def test_commands_for_text_name_predict_for_other_bundles(cli, bundle_of, command):
    name, *arguments = command
    outcome = cli(name, bundle_of("question-answering"), *arguments)
    assert outcome.code == 2
    assert_tells(UserError(outcome.err.strip()), "is for question-answering", "nemotron-export predict")


def test_text_is_generated_without_a_cache(cli, tmp_path):
    path = Toy("text-generation").write(tmp_path / "toy")
    outcome = cli("generate", path, "-p", "the sun", "--max-new-tokens", 3, "--ignore-eos", "--json")
    (row,) = json.loads(outcome.out)["sequences"]
    assert (outcome.code, len(row["token_ids"])) == (0, 3)


@pytest.mark.parametrize("task", ["question-answering", "text-generation"])
def test_bundles_without_a_cache_are_inspected(cli, tmp_path, task):
    path = Toy(task).write(tmp_path / "toy", golden=task != "text-generation")
    outcome = cli("inspect", path)
    assert (outcome.code, outcome.err) == (0, "")
    assert all(words in outcome.out for words in (task, "24 tokens", "model.onnx"))
    report = json.loads(cli("inspect", path, "--json").out)
    assert report["cache_bytes_per_token"] is None
    if task == "question-answering":
        assert "right-padded ×1, left-padded ×1, limit 0.0001" in outcome.out
        assert report["golden"] == {"cases": ["right-padded", "left-padded"], "limit": 1e-4}


def test_the_selftest_of_a_bundle_without_a_cache_names_what_is_wrong(cli, bundle_of):
    path = bundle_of("token-classification")
    outcome = cli("selftest", path)
    assert outcome.code == 0
    assert "right-padded" in outcome.out
    assert "passed: " in outcome.out
