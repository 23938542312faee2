"""The oracle is transformers' own pipeline over the same toy."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from corruptions import redescribe
from forward_bundles import Toy
from tokenizers import decoders, models, pre_tokenizers, processors
from toy_pipelines import assert_same, transformers_pipeline

from runtime import pipeline
from runtime.errors import UserError

NAMES = {"0": "O", "1": "B-STAR", "2": "I-STAR", "3": "B-COLD", "4": "I-COLD"}
TOY = Toy("token-classification", config={"id2label": NAMES})
STRATEGIES = ["none", "simple", "first", "average", "max"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]


def bytes_of() -> tokenizers.Tokenizer:
    """Words in several tokens, which say by their first character whether a space was before them."""
    words = [*SPECIAL, "Ġ", "m", "a", "r", "s", "u", "n", "i", "ma", "rs", "Ġs", "un", "Ġi", "Ġis", "."]
    merges = [("m", "a"), ("r", "s"), ("Ġ", "s"), ("u", "n"), ("Ġ", "i"), ("Ġi", "s")]
    tokenizer = tokenizers.Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces() -> tokenizers.Tokenizer:
    """Words in several tokens, which say by ## that they go on."""
    words = [*SPECIAL, "mars", "sun", "is", ".", "##is", "##mars", "##sun", "m", "##s"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def bundle(directory: Path, tokenizer: tokenizers.Tokenizer | None) -> Path:
    path = TOY.write(directory)
    if tokenizer is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"unk_token": "<unk>"}))
    redescribe(path)
    return path


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [
        (None, ["the  sun is a star", "mars", "big red star far pluto near moon cold old hot sun who a what"]),
        (bytes_of, ["mars  sun is marsun", "sun", "is mars. sun!sun maris suns is"]),
        (pieces, ["mars  sunis marsun", "sun", "is mars.sun ms pluto marssunis sunsis"]),
    ],
)
def test_tokens_words_and_runs_are_those_of_transformers(
    tokenizer: Any, texts: list[str], strategy: str, tmp_path: Path
) -> None:
    path = bundle(tmp_path / "toy", tokenizer and tokenizer())
    ours, theirs = pipeline("token-classification", path), transformers_pipeline(TOY, path)
    for inputs in (texts[0], texts[:1], texts):
        for ignored in ({}, {"ignore_labels": []}, {"ignore_labels": ["STAR", "I-COLD"]}):
            arguments = {"aggregation_strategy": strategy, **ignored}
            assert_same(ours(inputs, **arguments), theirs(inputs, **arguments))
    assert ours(texts[2], ignore_labels=[])


def test_the_strategy_may_be_the_pipelines_own(tmp_path: Path) -> None:
    path = TOY.write(tmp_path / "toy")
    ours, theirs = (make(aggregation_strategy="simple") for make in (
        lambda **own: pipeline("ner", path, **own), lambda **own: transformers_pipeline(TOY, path, **own)
    ))  # fmt: skip
    assert_same(ours("the sun is a star"), theirs("the sun is a star"))


def test_another_strategy_is_refused(tmp_path: Path) -> None:
    pipe = pipeline(TOY.write(tmp_path / "toy"))
    with pytest.raises(
        UserError, match="unknown aggregation_strategy 'last'; known: none, simple, first, average, max"
    ):
        pipe("mars", aggregation_strategy="last")
