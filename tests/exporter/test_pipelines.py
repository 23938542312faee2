"""From a checkpoint to both pipelines: transformers' own on it, ours on what was exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoints import write_checkpoint
from toy_pipelines import assert_same

from exporter.export import ExportOptions, export
from runtime import pipeline

TEXTS = ["Mars is red.", "Our solar system is the family of planets, moons and smaller bodies.", "naïve"]
NAMES = {0: "O", 1: "B-BODY", 2: "I-BODY"}
HEADS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "text-classification": ("NemotronForSequenceClassification", {"num_labels": 3}, [{}, {"top_k": None}]),
    "token-classification": (
        "NemotronForTokenClassification",
        {"id2label": NAMES},
        [{"aggregation_strategy": name} for name in ("none", "simple", "first", "average", "max")],
    ),
    "feature-extraction": ("NemotronModel", {}, [{}]),
}


def test_a_text_and_a_chat_end_as_the_checkpoints_do(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    ours = pipeline("text-generation", tiny_bundle, do_sample=False, max_new_tokens=100)
    theirs = transformers.pipeline("text-generation", str(tiny_checkpoint), device="cpu", dtype="float32")
    chats = [[{"role": "user", "content": text}] for text in ("What is a moon?", "Which planet is the largest?")]
    chats.append([*chats[0], {"role": "assistant", "content": "A moon is a "}])
    for inputs in ("Our solar system is", ["The largest planet", "Mars"], chats[0], chats):
        assert ours(inputs) == theirs(inputs, do_sample=False, max_new_tokens=100)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("task", HEADS)
def test_a_head_says_what_the_checkpoints_does(task: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    architecture, config, calls = HEADS[task]
    vocab = json.loads((tiny_checkpoint / "config.json").read_text())["vocab_size"]
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", architecture=architecture, vocab_size=vocab, pad_token_id=0, **config
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_checkpoint / name, checkpoint / name)
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions()).bundle
    ours, theirs = pipeline(task, bundle), transformers.pipeline(task, str(checkpoint), device="cpu")
    for arguments in calls:
        for inputs in (TEXTS[0], TEXTS):
            assert_same(ours(inputs, **arguments), theirs(inputs, **arguments))
