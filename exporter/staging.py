"""A bundle is written beside its destination under a temporary name and renamed when complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import UserError
from runtime.manifest import MANIFEST


def check_destination(destination: Path, force: bool) -> None:
    """Refuse a destination that must not be replaced.

    Raises:
        UserError: it exists and `force` is not given, or it is not a bundle, or its parent is not a directory.
    """
    if destination.is_symlink() or destination.exists():
        if not force:
            raise UserError(f"{destination} exists; choose another place, or replace the bundle there with --force")
        if destination.is_symlink() or not (destination / MANIFEST).is_file():
            raise UserError(f"{destination} is not a bundle, so --force does not replace it; choose another place")
    above = next(parent for parent in destination.absolute().parents if parent.exists())
    if not above.is_dir():
        raise UserError(f"{above} is not a directory, so {destination} cannot be made; choose another place")


@contextmanager
def staged(destination: Path, force: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `destination` when the body succeeds and vanishes when it does not.

    An existing bundle is moved aside first and deleted last, so that there is a whole one at every moment but the
    two renames.

    Raises:
        UserError: the destination must not be replaced, or cannot be written.
    """
    check_destination(destination, force)
    made = _make_parents(destination)
    try:
        try:
            staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
        except OSError as error:
            raise UserError(
                f"cannot write beside {destination}: {error.strerror}; choose another place or free space"
            ) from error
        try:
            yield staging
            staging.chmod(0o755)  # mkdtemp makes it private
            _swap(staging, destination, force)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except BaseException:
        for directory in made:
            directory.rmdir()
        raise


def _make_parents(destination: Path) -> list[Path]:
    """Make the parents that do not exist; return them, deepest first."""
    missing = [parent for parent in destination.parents if not parent.exists()]
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {destination.parent}: {error.strerror}; choose another place") from error
    return missing


def _swap(staging: Path, destination: Path, force: bool) -> None:
    check_destination(destination, force)  # something may have appeared there meanwhile
    old = staging.with_suffix(".old")
    if destination.exists():
        destination.rename(old)
    try:
        staging.rename(destination)
    except OSError:
        if old.exists():
            old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)
