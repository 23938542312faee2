"""The text that quality is measured on, or ranges are calibrated on: a file of documents as one stream of tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exporter.embedded import embedded_checkpoint
from exporter.spec import read_spec
from exporter.text_files import read_object
from exporter.tokenizer_files import open_tokenizer
from runtime.errors import UserError
from runtime.manifest import CONFIG, GENERATION_CONFIG
from runtime.session import Ints

TextName = Literal["heldout.txt", "calibration.txt"]

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_REMEDY = "give a UTF-8 text file, its documents separated by blank lines"


def default_text(name: TextName, checkpoint_path: Path) -> Path:
    """The checkpoint directory's own file of this name, else that of the checkpoint that comes with the package.

    Raises:
        UserError: the installation lacks it.
    """
    own = checkpoint_path / name
    return own if own.is_file() else embedded_checkpoint() / name


def read_tokens(path: Path, checkpoint_path: Path) -> list[int]:
    """Encode the documents of a text file, separated by blank lines, as one stream of token ids.

    Each document has the special tokens that the checkpoint's tokenizer adds, and is followed by the first token that
    ends a text: of generation_config.json, else of config.json, else none.

    Args:
        path: UTF-8 text.
        checkpoint_path: the checkpoint's directory: its tokenizer and configuration are read, no weights.

    Raises:
        UserError: the file cannot be read, is no text, or has no document; or the checkpoint's tokenizer or
            configuration is missing, or gives an id that the model does not know.
    """
    documents = _documents(path)
    tokenizer, source = open_tokenizer(checkpoint_path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = _first_eos(checkpoint_path)
    tokens: list[int] = []
    for document in documents:
        tokens += [*tokenizer.encode(document).ids, *end]
    vocab = read_spec(checkpoint_path).vocab
    outside = next((token for token in tokens if not 0 <= token < vocab), None)
    if outside is not None:
        raise UserError(
            f"{path} has token id {outside} by {source}, the model's vocabulary ends at {vocab - 1}; "
            "tokenizer and weights are not of one model"
        )
    return tokens


def windows(tokens: Sequence[int], length: int, most: int, text: Path | str = "the text") -> Ints:
    """Cut a stream into consecutive windows, int64 [n, length] with n * length <= most; what is left over is dropped.

    Args:
        tokens: the stream.
        length: tokens of a window.
        most: tokens of all windows together.
        text: what the stream is of, in errors.

    Raises:
        UserError: a window of fewer than two tokens, which predicts none, or not one window in `most` or in the stream.
    """
    if length < 2:
        raise UserError(f"a window of {length} token predicts none; give windows of at least 2 tokens")
    if most < length:
        raise UserError(f"{most} tokens are less than one window of {length}; ask for at least {length} tokens")
    count = min(len(tokens), most) // length
    if not count:
        raise UserError(f"{text} gives {len(tokens)} tokens, less than one window of {length}; give a longer text")
    return np.array(tokens[: count * length], np.int64).reshape(count, length)


def _documents(path: Path) -> list[str]:
    if not path.exists():
        raise UserError(f"{path} is missing; {_REMEDY}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {_REMEDY}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); {_REMEDY}") from error
    if "\0" in text:
        raise UserError(f"{path} is not text, it holds a NUL; {_REMEDY}")
    found = [document for document in _BLANK_LINES.split(text.strip()) if document]
    if not found:
        raise UserError(f"{path} is empty; {_REMEDY}")
    return found


def _first_eos(directory: Path) -> list[int]:
    """The first id of eos_token_id, from generation_config.json where that has the key, else from config.json."""
    name, value = _eos_value(directory)
    ids: Iterable[Any] = value if isinstance(value, list) else [] if value is None else [value]
    first = next(iter(ids), None)
    if first is None:
        return []
    if isinstance(first, bool) or not isinstance(first, int):
        raise UserError(f"{directory / name}: eos_token_id should be an integer or a list, found {value!r}; correct it")
    return [first]


def _eos_value(directory: Path) -> tuple[str, Any]:
    for name in (GENERATION_CONFIG, CONFIG):
        config = read_object(directory / name) if (directory / name).is_file() else {}
        if "eos_token_id" in config:
            return name, config["eos_token_id"]
    return CONFIG, None
