"""What a checkpoint says about its tokenizer beside the tokenizer's model: special tokens, added tokens, ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from exporter.text_files import read_object
from runtime.errors import UserError
from runtime.manifest import TOKENIZER_CONFIG

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("extra_special_tokens", "additional_special_tokens")  # today's name and the one before


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens that the configuration files of a tokenizer declare.

    Attributes:
        roles: text by role (`bos_token`, …); None where a file says that there is none.
        added: tokens with the id that a file gives them. They are found in the text as it stands.
        extra: special tokens without a role; they have an id, or get the next one.
        add_bos: whether a text begins with the `bos_token`.
        add_eos: whether it ends with the `eos_token`.
        prefix_once: whether a space is put before the text's beginning only, not also after each special token.
    """

    roles: Mapping[str, str | None]
    added: Mapping[int, AddedToken]
    extra: tuple[str, ...]
    add_bos: bool
    add_eos: bool
    prefix_once: bool


def read_special_tokens(directory: Path) -> SpecialTokens:
    """Read tokenizer_config.json and, where it lists no added tokens, the two files that came before it.

    Raises:
        UserError: a file does not hold what it should.
    """
    path = directory / TOKENIZER_CONFIG
    config = _read(path)
    if "added_tokens_decoder" in config:  # as transformers: what it lists is the whole
        listed = config["added_tokens_decoder"]
        if not isinstance(listed, dict):
            raise _wrong(path, "added_tokens_decoder", listed)
        added = {_id(path, index): _added(path, token) for index, token in listed.items()}
        roles, extra = _roles(path, config), _extra(path, config)
    else:
        older = directory / SPECIAL_TOKENS_MAP
        named = _read(older)
        roles = _roles(path, config) | _roles(older, named)
        extra = tuple(dict.fromkeys((*_extra(path, config), *_extra(older, named))))
        special = {*roles.values(), *extra}
        numbers = directory / ADDED_TOKENS
        added = {
            _id(numbers, index): AddedToken(text, normalized=False, special=text in special)
            for text, index in _read(numbers).items()
        }
    return SpecialTokens(
        roles,
        added,
        extra,
        add_bos=bool(config.get("add_bos_token")),
        add_eos=bool(config.get("add_eos_token")),
        prefix_once=config.get("legacy") is False,
    )


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _roles(path: Path, config: Mapping[str, Any]) -> dict[str, str | None]:
    return {role: None if config[role] is None else _text(path, role, config[role]) for role in ROLES if role in config}


def _extra(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    name = next((name for name in EXTRA if config.get(name)), None)
    if name is None:
        return ()
    tokens = config[name]
    if isinstance(tokens, dict):
        tokens = list(tokens.values())
    if not isinstance(tokens, list):
        raise _wrong(path, name, tokens)
    return tuple(_text(path, name, token) for token in tokens)


def _added(path: Path, token: Any) -> AddedToken:
    """An added token; `normalized` is left out, for a slow tokenizer looks for its tokens in the text as it stands."""
    text = _text(path, "added_tokens_decoder", token)
    if not isinstance(token, dict):
        raise _wrong(path, "added_tokens_decoder", token)
    flags = {name: token.get(name, False) for name in ("single_word", "lstrip", "rstrip", "special")}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise _wrong(path, "added_tokens_decoder", token)
    return AddedToken(text, normalized=False, **flags)


def _text(path: Path, name: str, token: Any) -> str:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise _wrong(path, name, token)
    return text


def _id(path: Path, index: Any) -> int:
    if type(index) is int:
        return index
    if isinstance(index, str) and index.isdecimal():
        return int(index)
    raise UserError(f"{path}: {index!r} should be a token id; correct it")


def _wrong(path: Path, name: str, found: Any) -> UserError:
    return UserError(f"{path}: {name} should hold tokens, found {found!r}; correct it")
