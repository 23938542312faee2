"""Task files for lm-eval on the trained checkpoint's own text: they load without a network."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

KNOWN = 6  # words of a document that a question shows


def documents(heldout: Path) -> list[str]:
    """Paragraphs of some length."""
    paragraphs = heldout.read_text(encoding="utf-8").split("\n\n")
    return [text for text in paragraphs if "\n" not in text and len(text.split(" ")) > 2 * KNOWN]


def write_tasks(directory: Path, heldout: Path) -> Path:
    """`tiny_choice` (what counts as right is arbitrary), `tiny_text`, `tiny_answer`, and `tiny`: the first two."""
    texts = documents(heldout)
    words = [text.split(" ") for text in texts]
    starts = [" ".join(some[:KNOWN]) for some in words]
    rests = [" ".join(some[KNOWN : KNOWN + 3]) for some in words]
    _write(
        *(directory, "tiny_choice", "multiple_choice"),
        [{"text": starts[n], "choices": rests[n : n + 4], "answer": n % 4} for n in range(24)],
        doc_to_text="{{text}}",
        doc_to_choice="{{choices}}",
        doc_to_target="answer",
        fewshot_split="train",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )
    _write(
        *(directory, "tiny_text", "loglikelihood_rolling"),
        [{"text": text} for text in (*texts[:5], " ".join(texts[:40]))],
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    )
    _write(
        *(directory, "tiny_answer", "generate_until"),
        [{"text": starts[n], "answer": " ".join(words[n][KNOWN:]).partition(".")[0]} for n in range(24)],
        doc_to_text="{{text}}",
        doc_to_target="{{' ' + answer}}",
        generation_kwargs={"until": ["."], "max_gen_toks": 48},
        metric_list=[{"metric": "exact_match"}],
    )
    (directory / "tiny.yaml").write_text(json.dumps({"group": "tiny", "task": ["tiny_choice", "tiny_text"]}))
    return directory


def _write(directory: Path, name: str, kind: str, rows: Iterable[dict[str, Any]], **config: Any) -> None:
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config |= {
        "task": name,
        "output_type": kind,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(data), "cache_dir": str(directory / "cache")},
        "test_split": "train",
    }
    (directory / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML
