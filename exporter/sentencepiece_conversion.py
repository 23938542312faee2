"""A sentencepiece model as tokenizer.json."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from exporter.sentencepiece_reference import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, SentencePieceModel, compare
from exporter.special_tokens import ROLES, SpecialTokens
from runtime.errors import UserError
from runtime.manifest import TOKENIZER

NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model")
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType


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
    _split_symbols(tokenizer, model)
    _add_tokens(tokenizer, model, special)
    _add_ends(tokenizer, model, special)
    difference = compare(tokenizer, model)
    if difference is not None:
        raise _refusal(path, difference)
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
        return Tokenizer(
            models.BPE(
                ids,
                generate_merges(ids, normal),
                unk_token=pieces[model.processor.unk_id()].piece,
                fuse_unk=True,
                byte_fallback=trained.byte_fallback,
                ignore_merges=bool(model.of_type(USER_DEFINED)),  # no merges lead to a symbol: it is taken as it is
            )
        )
    if trained.model_type == UNIGRAM:
        # Only normal pieces may be found in text. The others need a score: one that costs more than any way around.
        unlikely = (min(normal.values(), default=0.0) - 10.0) * 64
        likely = normal | dict.fromkeys(model.of_type(USER_DEFINED), 0.0)
        scored = [(piece.piece, likely.get(piece.piece, unlikely)) for piece in pieces]
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


def _split_symbols(tokenizer: Tokenizer, model: SentencePieceModel) -> None:
    """Keep each user-defined symbol whole.

    As added tokens they would divide the text before it is normalized, and every part would get a space in front.
    """
    symbols = sorted(model.of_type(USER_DEFINED), key=len, reverse=True)  # the longest match counts
    if symbols:
        pattern = Regex("|".join(re.escape(symbol) for symbol in symbols))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")


def _add_tokens(tokenizer: Tokenizer, model: SentencePieceModel, special: SpecialTokens) -> None:
    """Have the model's control tokens, and those that the checkpoint's files declare, found in text as a whole."""
    control = {**model.of_type(UNKNOWN), **model.of_type(CONTROL)}
    tokens = {token: AddedToken(token, normalized=False, special=True) for token in control}
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


def _refusal(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be converted to {TOKENIZER}: {reason}; "
        f"put the {TOKENIZER} of the model's authors into the checkpoint"
    )
