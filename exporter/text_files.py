"""The text and JSON files of a checkpoint, read with an error that says what to do, and JSON written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runtime.errors import UserError


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else.
    """
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}); download the checkpoint again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} should hold a JSON object; download the checkpoint again")
    return value


def read_text(path: Path) -> str:
    """Read a file of UTF-8 text.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; change its permissions or copy it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); download the checkpoint again") from error


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as people can read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
