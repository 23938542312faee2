"""sentencepiece's own reading of a model, and the comparison of a converted tokenizer with it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from runtime.errors import UserError
from runtime.manifest import TOKENIZER

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # sentencepiece_model.proto: ModelProto.SentencePiece.Type
RUN = 32  # pieces in one text of the comparison
SAMPLES = (
    "",
    "Our solar system is the Sun and what orbits it.",
    " a space before, and two after  ",
    "three   spaces,    four,\t\ta tab \t and \n\n\n lines\r\n  indented\n",
    "   \n   ",
    "0 12 345 6789 3.14159 1,000,000 2026-01-02 0x1F ½ ² ٣",
    "def f(x: int) -> str:\n    return {'a': [x, 1]}[\"a\"]  # ok?\n",
    "Füße, naïve café, Čeština, Türkçe İı, Ελληνικά, Русский",
    "日本語の文章。 中文句子，全角ＡＢＣ１２３ 한국어 문장",
    "العربية עברית हिन्दी ภาษาไทย தமிழ்",
    "🪐🚀 👩‍👩‍👧 🇩🇪 ❤️ 👍🏽",
    "e\u0301 \u00e9 \ufb01 \u212b \u1e9b\u0323 \u200b\u200d\u00a0\u3000\u00ad\ufeff",
    "\x01\x02\x1b[0m\x7f\x85\u2028",
    "\U00010348\U0001f9ff\uffff\ue000 \u0b95\u1780",
    "<0x0A> <0xE2><0x96>",
    "<s> </s> <unk> <pad> [INST] <|im_start|> <extra_id_0>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa========------------________",
    "https://example.com/a_b?c=d&e=%20#f user@example.com C:\\dir\\file.txt $x^2 \\frac{1}{2}$",
)


@dataclass(frozen=True)
class SentencePieceModel:
    """A sentencepiece model: its file, its protobuf, and sentencepiece's own tokenizer of it."""

    path: Path
    proto: Any
    processor: Any

    @classmethod
    def open(cls, path: Path) -> SentencePieceModel:
        """Read a model.

        Raises:
            UserError: it cannot be read as one.
        """
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        messages: Any = sentencepiece_model_pb2  # its classes are made at run time
        try:
            data = path.read_bytes()
            processor = SentencePieceProcessor()
            processor.LoadFromSerializedProto(data)
        except (OSError, RuntimeError) as error:  # sentencepiece raises RuntimeError for every fault of the model
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path} cannot be read as a sentencepiece model ({reason}); download it again, or add a {TOKENIZER}"
            ) from error
        return cls(path, messages.ModelProto.FromString(data), processor)

    def of_type(self, kind: int) -> dict[str, int]:
        """Ids by piece, of the pieces of one type."""
        return {piece.piece: index for index, piece in enumerate(self.proto.pieces) if piece.type == kind}


def compare(tokenizer: Tokenizer, model: SentencePieceModel) -> str | None:
    """Compare token ids, and text from them, with sentencepiece's own; tell the first difference, if there is one.

    Special tokens are no business of sentencepiece: it is asked for the text between them, as transformers' slow
    tokenizers do.
    """
    expected_ids = _oracle(tokenizer, model)
    added = tokenizer.get_added_tokens_decoder()
    special = {index for index, token in added.items() if token.special}
    unknown, size = model.processor.unk_id(), model.processor.vocab_size()
    for text in _texts(tokenizer, model):
        ids, expected = tokenizer.encode(text, add_special_tokens=False).ids, expected_ids(text)
        if ids != expected:
            return f"of {_brief(text)} it makes {_first(ids, expected)}"
        shown = [index for index in ids if index not in special]
        if unknown in ids or max(shown, default=-1) >= size:
            continue  # sentencepiece writes ⁇ for the one and does not know the other
        back, again = tokenizer.decode(ids, skip_special_tokens=True), model.processor.decode(shown)
        if back != again:
            return f"from the tokens of {_brief(text)} comes {_brief(back)}, not {_brief(again)}"
    return None


def _oracle(tokenizer: Tokenizer, model: SentencePieceModel) -> Callable[[str], list[int]]:
    """Token ids of a text: sentencepiece's, but for special tokens."""
    added = tokenizer.get_added_tokens_decoder()
    whole = {token.content: (index, token) for index, token in added.items()}
    pattern = re.compile(f"({'|'.join(re.escape(token) for token in sorted(whole, key=len, reverse=True))})")

    def ids(text: str) -> list[int]:
        parts = pattern.split(text)  # texts at even places, tokens between them
        for place in range(1, len(parts), 2):
            token = whole[parts[place]][1]
            if token.lstrip:
                parts[place - 1] = parts[place - 1].rstrip()
            if token.rstrip:
                parts[place + 1] = parts[place + 1].lstrip()
        texts = [model.processor.encode(part) for part in parts[::2]]
        tokens = [[whole[part][0]] for part in parts[1::2]]
        return [index for pair in zip_longest(texts, tokens, fillvalue=()) for found in pair for index in found]

    return ids


def _texts(tokenizer: Tokenizer, model: SentencePieceModel) -> Iterator[str]:
    yield from SAMPLES
    symbols = list(model.of_type(USER_DEFINED))
    for token in (*symbols, *(token.content for token in tokenizer.get_added_tokens_decoder().values())):
        yield f"Mars{token}orbits{token}"
        yield f"{token}Mars"
    pieces = [piece.replace("▁", " ") for piece in model.of_type(NORMAL)]
    for between in ("", *symbols[:1]):  # each piece beside others, and alone
        for start in range(0, len(pieces), RUN):
            yield between.join(pieces[start : start + RUN])


def _brief(text: str) -> str:
    return ascii(text if len(text) <= 60 else f"{text[:60]}…")


def _first(ids: list[int], expected: list[int]) -> str:
    """Where two lists of tokens part."""
    pairs = enumerate(zip_longest(ids, expected))
    place, (found, wanted) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
    return f"token {place} {found}, sentencepiece {wanted}"
