"""What a message to the user must be, and what must not have changed when there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.errors import UserError


def assert_tells(error: BaseException, *named: object) -> None:
    """One line, exit code 2, that names these things and says what to do after the last semicolon."""
    assert isinstance(error, UserError)
    assert error.exit_code == 2
    message = str(error)
    assert "\n" not in message
    for thing in named:
        assert str(thing) in message, f"{thing} is not named in: {message}"
    remedies = (
        "; ",
        ", so ",
        "known: ",
        "should be within",
        "only 'nemotron' can be",
        "is not a Hugging Face checkpoint",
    )
    assert any(remedy in message for remedy in remedies), f"no remedy in: {message}"


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """Everything under a directory: the bytes of files, None for directories and links."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def refused(directory: Path, work: Callable[[], object]) -> UserError:
    """Why work is not done; what is in the directory stays as it was."""
    before = snapshot(directory)
    with pytest.raises(UserError) as refusal:
        work()
    assert snapshot(directory) == before
    return refusal.value
