"""A sentencepiece model as tokenizer.json, and the comparison that says whether it is the same tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from exporter.special_tokens import ROLES, SpecialTokens
from runtime.errors import UserError
from runtime.manifest import TOKENIZER

NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # sentencepiece_model.proto: ModelProto.SentencePiece.Type
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
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
            processor = SentencePieceProcessor(model_proto=data)
        except (OSError, RuntimeError) as error:  # sentencepiece raises RuntimeError for every fault of the model
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path} cannot be read as a sentencepiece model ({reason}); download it again, or add a {TOKENIZER}"
            ) from error
        return cls(path, messages.ModelProto.FromString(data), processor)

    def of_type(self, kind: int) -> dict[str, int]:
        """Ids by piece, of the pieces of one type."""
        return {piece.piece: index for index, piece in enumerate(self.proto.pieces) if piece.type == kind}


def find_model(directory: Path) -> Path | None:
    """The sentencepiece model of a checkpoint: a file of a known name, or the only one with the suffix .model.

    Raises:
        UserError: there are several, none of a known name.
    """
    known = [directory / name for name in NAMES if (directory / name).is_file()]
    found = known or sorted(path for path in directory.glob("*.model") if path.is_file())
    if len(found) > 1 and not known:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{directory} has several tokenizer models, {names}; rename the right one to {NAMES[0]}")
    return found[0] if found else None


def convert(path: Path, special: SpecialTokens) -> Tokenizer:
    """Convert a sentencepiece model, and compare the result with sentencepiece on sample text and on every piece.

    Raises:
        UserError: the model cannot be read, or tokenizers cannot do as it does.
    """
    model = SentencePieceModel.open(path)
    spec = model.proto.normalizer_spec
    if special.prefix_once and spec.add_dummy_prefix:
        raise _refusal(path, "with `legacy` false a space is put before the first text only, which tokenizers cannot")
    tokenizer = _pieces(model)
    tokenizer.normalizer = _normalizer(spec)
    tokenizer.decoder = _decoder(spec)
    _add_tokens(tokenizer, model, special)
    _add_ends(tokenizer, model, special)
    compare(tokenizer, model, special)
    return tokenizer


def role_tokens(path: Path, special: SpecialTokens) -> dict[str, str]:
    """Text by role: what the checkpoint's files say, else what the model has; roles without a token are left out."""
    return _roles(SentencePieceModel.open(path), special)


def _roles(model: SentencePieceModel, special: SpecialTokens) -> dict[str, str]:
    processor = model.processor
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "unk_token": processor.unk_id()}
    roles = {role: processor.id_to_piece(index) for role, index in ids.items() if index >= 0} | dict(special.roles)
    return {role: token for role in ROLES if (token := roles.get(role)) is not None}


def _pieces(model: SentencePieceModel) -> Tokenizer:
    """The model without what is around it: pieces with their scores or merges."""
    pieces, trained = model.proto.pieces, model.proto.trainer_spec
    normal = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    if trained.model_type == BPE:
        from transformers.convert_slow_tokenizer import generate_merges

        ids = {piece.piece: index for index, piece in enumerate(pieces)}
        merges = generate_merges(ids, normal)
        fallback, unknown = trained.byte_fallback, pieces[model.processor.unk_id()].piece
        return Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback))
    if trained.model_type == UNIGRAM:
        # Only normal pieces may be found in text. The others need a score: one that costs more than any way around.
        unlikely = (min(normal.values(), default=0.0) - 10.0) * 64
        scored = [(piece.piece, normal.get(piece.piece, unlikely)) for piece in pieces]
        return Tokenizer(models.Unigram(scored, model.processor.unk_id(), trained.byte_fallback))
    raise _refusal(model.path, f"it is of type {trained.model_type}, not a unigram or BPE model")


def _normalizer(spec: Any) -> Any:
    """What sentencepiece does to a text first, from NormalizerSpec."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    return normalizers.Sequence(steps)


def _decoder(spec: Any) -> Any:
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    return decoders.Sequence(steps)


def _add_tokens(tokenizer: Tokenizer, model: SentencePieceModel, special: SpecialTokens) -> None:
    """Have the model's symbols, and the tokens that the checkpoint's files declare, found in text as a whole."""
    tokens = {
        piece.piece: AddedToken(piece.piece, normalized=False, special=piece.type != USER_DEFINED)
        for piece in model.proto.pieces
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    roles = _roles(model, special).values()
    declared = {token.content: token for _, token in sorted(special.added.items())}
    for content, token in declared.items():
        token.special = token.special or content in roles
    tokens |= declared
    for content in (*roles, *special.extra):
        tokens.setdefault(content, AddedToken(content, normalized=False, special=True))
    tokenizer.add_tokens(list(tokens.values()))
    for index, token in special.added.items():
        found = tokenizer.token_to_id(token.content)
        if found != index:
            raise _refusal(
                model.path, f"its files give the token {token.content!r} the id {index}, it would be {found}"
            )


def _add_ends(tokenizer: Tokenizer, model: SentencePieceModel, special: SpecialTokens) -> None:
    """Have texts begin with the bos_token and end with the eos_token where the checkpoint says so."""
    roles = _roles(model, special)
    ends = {
        role: roles[role]
        for role, wanted in (("bos_token", special.add_bos), ("eos_token", special.add_eos))
        if wanted and role in roles
    }
    if ends:
        bos, eos = (["bos"] if "bos_token" in ends else []), (["eos"] if "eos_token" in ends else [])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *(f"{name}:1" for name in bos), "$B:1", *(f"{name}:1" for name in eos)],
            special_tokens=[
                {"id": role.removesuffix("_token"), "ids": [tokenizer.token_to_id(token)], "tokens": [token]}
                for role, token in ends.items()
            ],
        )


def compare(tokenizer: Tokenizer, model: SentencePieceModel, special: SpecialTokens) -> None:
    """Compare token ids, and text from them, with sentencepiece's own.

    Special tokens are no business of sentencepiece: it is asked for the text between them, as transformers' slow
    tokenizers do.

    Raises:
        UserError: a text has other ids, or other text comes from its ids.
    """
    expected_ids = _oracle(tokenizer, model, special)
    unknown = model.processor.unk_id()
    for text in _texts(tokenizer, model):
        ids, expected = tokenizer.encode(text, add_special_tokens=False).ids, expected_ids(text)
        if ids != expected:
            place = next((n for n, pair in enumerate(zip(ids, expected, strict=False)) if len(set(pair)) > 1), -1)
            raise _refusal(
                model.path,
                f"of {_brief(text)} it makes {len(ids)} tokens, sentencepiece {len(expected)}, "
                f"different from token {min(len(ids), len(expected)) if place < 0 else place} on",
            )
        if unknown in ids or any(index >= len(model.proto.pieces) for index in ids):
            continue  # sentencepiece writes ⁇ for the one and does not know the other
        back, again = tokenizer.decode(ids, skip_special_tokens=True), model.processor.decode(ids)
        if back != again:
            raise _refusal(model.path, f"from the tokens of {_brief(text)} comes {_brief(back)}, not {_brief(again)}")


def _oracle(tokenizer: Tokenizer, model: SentencePieceModel, special: SpecialTokens) -> Callable[[str], list[int]]:
    """Token ids of a text: sentencepiece's, but for special tokens."""
    own = model.of_type(USER_DEFINED).keys() - {token.content for token in special.added.values()}
    added = tokenizer.get_added_tokens_decoder()
    whole = {token.content: (index, token) for index, token in added.items() if token.content not in own}
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
    for token in tokenizer.get_added_tokens_decoder().values():
        yield f"Mars{token.content}orbits{token.content}"
        yield f"{token.content}Mars"
    pieces = [piece.replace("▁", " ") for piece in model.of_type(NORMAL)]
    for start in range(0, len(pieces), RUN):
        yield "".join(pieces[start : start + RUN])


def _brief(text: str) -> str:
    return ascii(text if len(text) <= 60 else f"{text[:60]}…")


def _refusal(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be converted to {TOKENIZER}: {reason}; "
        f"put the {TOKENIZER} of the model's authors into the checkpoint"
    )
