"""Small sentencepiece models, trained on the repository's own text with the settings that Nemotron's have."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

TEXT = Path(__file__).parents[2] / "artifacts" / "tiny-nemotron" / "calibration.txt"
SIZE = 470
NEMOTRON: dict[str, Any] = {  # whitespace and case are kept, digits are split, bytes stand for what is unknown
    "vocab_size": SIZE,
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "split_digits": True,
    "character_coverage": 1.0,
    "required_chars": "<>_x0123456789ABCDEF",
    "hard_vocab_limit": False,
}
TEXTS = (
    "Our solar system is the Sun and what orbits it.",
    " a space before, two after  ",
    "   ",
    "tabs\t\tand   runs\n\n\n  of\r\n whitespace\n",
    "in 1846, 3.14159 and 0x1F",
    "def f(x):\n    return {'a': [x]}\n",
    "naïve café, Čeština, Ελληνικά, 日本語の文章, العربية, हिन्दी",
    "🪐🚀 👩‍👩‍👧 ❤️",
    "e\u0301\u200b\u00a0\u3000\x01\x1b[0m\x7f",
)


def train(directory: Path, kind: str = "bpe", name: str = "tokenizer.model", **settings: Any) -> SentencePieceProcessor:
    """Write a model of `kind` (bpe, unigram, word, char) into `directory`; `settings` go over NEMOTRON."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.read_text(encoding="utf-8").splitlines()),
        model_writer=written,
        model_type=kind,
        num_threads=1,
        minloglevel=2,
        **{**NEMOTRON, **settings},
    )
    (directory / name).write_bytes(written.getvalue())
    return SentencePieceProcessor(model_proto=written.getvalue())


def write_config(directory: Path, name: str = "tokenizer_config.json", **config: Any) -> None:
    """Write one of the JSON files that are beside a tokenizer's model."""
    (directory / name).write_text(json.dumps(config), encoding="utf-8")


def added(text: str, special: bool = True) -> dict[str, Any]:
    """An entry of `added_tokens_decoder`, as transformers writes it."""
    return {
        "content": text,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": special,
    }
