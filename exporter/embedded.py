"""The small checkpoint that comes with the package, and the texts beside it."""

from __future__ import annotations

from pathlib import Path

from runtime.errors import UserError

NAME = "tiny-nemotron"


def embedded_checkpoint() -> Path:
    """The checkpoint in the installed package, or in the source tree.

    Raises:
        UserError: neither has it.
    """
    package = Path(__file__).parent
    places = (package / "data" / NAME, package.parent / "artifacts" / NAME)
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        raise UserError(f"{places[0]} is missing; install nemotron-export again")
    return found
