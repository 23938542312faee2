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
from transformers.pipelines.token_classification import AggregationStrategy

from runtime import load
from runtime.predict.token_classification import Tag, TaggedText, TokenClassifier

NAMES = {"0": "O", "1": "B-STAR", "2": "I-STAR", "3": "B-COLD", "4": "I-COLD"}
TEXTS = ["the  sun is a star", "mars", "big red star far near moon cold old hot sun who a what"]
TOY = Toy("token-classification", config={"id2label": NAMES})


@pytest.fixture
def model(tmp_path: Path) -> TokenClassifier:
    return load(TOY.write(tmp_path / "toy", golden=True), task="token-classification")


def pipeline_of(model: TokenClassifier) -> Any:
    file = str(model.bundle.file("tokenizer.json"))
    pipeline = object.__new__(transformers.TokenClassificationPipeline)
    pipeline.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, unk_token="<unk>")
    pipeline.model = SimpleNamespace(config=SimpleNamespace(id2label={int(k): v for k, v in NAMES.items()}))
    return pipeline


def expected_of(model: TokenClassifier, text: str, strategy: AggregationStrategy, ignore: list[str]) -> Any:
    pipeline = pipeline_of(model)
    inputs = pipeline.tokenizer(text, return_tensors="pt", return_special_tokens_mask=True, return_offsets_mapping=True)
    logits = torch.tensor(TOY.logits(inputs["input_ids"][0].tolist()))[None]
    return pipeline.postprocess([{**inputs, "logits": logits, "sentence": text}], strategy, ignore)


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_tagged_as_by_transformers(model: TokenClassifier, text: str) -> None:
    (result,) = [found for found in model.tag(TEXTS) if found.text == text]  # in one batch, with padding
    expected = expected_of(model, text, AggregationStrategy.NONE, [])
    assert [(tag.label, tag.start, tag.end) for tag in result.tokens] == [
        (row["entity"], row["start"], row["end"]) for row in expected
    ]
    np.testing.assert_allclose([tag.score for tag in result.tokens], [row["score"] for row in expected], atol=1e-5)
    assert all(tag.text == text[tag.start : tag.end] for tag in result.tokens)
    assert [tag.text for tag in result.tokens] == text.split()  # the tokenizer's <s> has no characters


@pytest.mark.parametrize("text", TEXTS)
def test_runs_of_tokens_are_joined_as_by_transformers(model: TokenClassifier, text: str) -> None:
    found = model.tag(text)[0].entities()
    expected = expected_of(model, text, AggregationStrategy.SIMPLE, ["O"])
    assert [(row.label, row.start, row.end) for row in found] == [
        (row["entity_group"], row["start"], row["end"]) for row in expected
    ]
    np.testing.assert_allclose([row.score for row in found], [row["score"] for row in expected], atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_any_sequence_of_labels_is_joined_as_by_transformers(model: TokenClassifier, seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.choice(["O", "B-A", "I-A", "B-B", "I-B", "A", "B", "I-X-Y", "X-Y"], 24)
    words = [f"w{n}" for n in range(len(labels))]
    text, tags, start = " ".join(words), [], 0
    for word, label in zip(words, labels, strict=True):
        tags.append(Tag(word, str(label), float(random.random()), start, start + len(word)))
        start += len(word) + 1
    pipeline = pipeline_of(model)
    entities = [{"entity": t.label, "score": t.score, "word": t.text, "start": t.start, "end": t.end} for t in tags]
    expected = pipeline.group_entities(entities)
    found = TaggedText(text, tuple(tags)).entities(ignore=())
    assert [(row.label, row.start, row.end) for row in found] == [
        (row["entity_group"], row["start"], row["end"]) for row in expected
    ]
    np.testing.assert_allclose([row.score for row in found], [row["score"] for row in expected])


def test_tags_are_json(model: TokenClassifier) -> None:
    data = json.loads(json.dumps(model.tag("mars is red")[0].to_json()))
    assert set(data) == {"tokens", "entities"}
    assert set(data["tokens"][0]) == {"text", "label", "score", "start", "end"}
