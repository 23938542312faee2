"""A checkpoint's tokenizer and chat template, in whatever form it has them, as the files of a bundle."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from exporter.checkpoint import Checkpoint
from exporter.sentencepiece_conversion import convert, find_model, role_tokens
from exporter.special_tokens import read_special_tokens
from exporter.text_files import read_object, read_text, write_object
from runtime.chat_template import ChatTemplate
from runtime.errors import UserError
from runtime.manifest import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG

TEMPLATE_JSON = "chat_template.json"  # where processors kept it before there was chat_template.jinja
MORE_TEMPLATES = "additional_chat_templates"


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """Check the tokenizer and its chat template before any work is done.

    Raises:
        UserError: no tokenizer, or one that cannot be loaded or converted, or that has tokens the model does not know;
            or a template that is not valid.
    """
    tokenizer, source = open_tokenizer(checkpoint.path)
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= checkpoint.spec.vocab:
        raise UserError(
            f"{source} has token id {largest}, the model's vocabulary ends at {checkpoint.spec.vocab - 1}; "
            "tokenizer and weights are not of one model"
        )
    template = chat_template(checkpoint.path)
    if template is not None:
        ChatTemplate(template, checkpoint.path / CHAT_TEMPLATE)


def write_tokenizer(checkpoint: Checkpoint, directory: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template into `directory`.

    Files that the checkpoint has are copied. What is converted gets its special tokens into tokenizer_config.json,
    where the runtime finds them for the template.

    Raises:
        UserError: as `check_tokenizer`.
    """
    path = checkpoint.path / TOKENIZER_CONFIG
    if (checkpoint.path / TOKENIZER).is_file():
        shutil.copyfile(checkpoint.path / TOKENIZER, directory / TOKENIZER)
        if path.is_file():
            shutil.copyfile(path, directory / TOKENIZER_CONFIG)
    else:
        tokenizer, source = open_tokenizer(checkpoint.path)
        tokenizer.save(str(directory / TOKENIZER))
        config = read_object(path) if path.is_file() else {}
        roles = role_tokens(source, read_special_tokens(checkpoint.path))
        write_object(directory / TOKENIZER_CONFIG, config | roles)
    template = chat_template(checkpoint.path)
    if template is not None:
        (directory / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def open_tokenizer(directory: Path) -> tuple[Tokenizer, Path]:
    """The tokenizer, loaded or converted, and the file that it comes from.

    Raises:
        UserError: there is none, or it cannot be loaded or converted.
    """
    path = directory / TOKENIZER
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path)), path
        except Exception as error:  # tokenizers raises plain Exception for every fault of the file
            raise UserError(f"{path} cannot be loaded: {error}; download the checkpoint again") from error
    model = find_model(directory)
    if model is None:
        raise UserError(
            f"{directory} has no {TOKENIZER} and no sentencepiece model to convert; write one with transformers: "
            "AutoTokenizer.from_pretrained(checkpoint).save_pretrained(checkpoint)"
        )
    return convert(model, read_special_tokens(directory)), model


def chat_template(directory: Path) -> str | None:
    """The checkpoint's default chat template, as transformers chooses it; None where there is no template.

    A file counts before tokenizer_config.json, and that before the chat_template.json of older checkpoints.

    Raises:
        UserError: there are templates but no default, or one is not text.
    """
    file, more = directory / CHAT_TEMPLATE, directory / MORE_TEMPLATES
    files = {"default": file} if file.is_file() else {}
    files |= {path.stem: path for path in sorted(more.glob("*.jinja"))}
    if files:
        return read_text(_default(more, files))
    for name in (TOKENIZER_CONFIG, TEMPLATE_JSON):
        path = directory / name
        template = read_object(path).get("chat_template") if path.is_file() else None
        if isinstance(template, list):
            template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if isinstance(template, dict):
            template = _default(path, template)
        if isinstance(template, str):
            return template
        if template is not None:
            raise UserError(f"{path}: chat_template should be text, found {type(template).__name__}; correct it")
    return None


def _default(place: Path, named: Mapping[Any, Any]) -> Any:
    if "default" not in named:
        raise UserError(f"{place} has chat templates {', '.join(map(str, named))} but no 'default'; rename one")
    return named["default"]
