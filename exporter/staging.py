"""A bundle, or what holds one, is written beside its destination under a temporary name and renamed when complete."""

from __future__ import annotations

import errno
import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError
from runtime.manifest import MANIFEST

TOOL = "nemotron-export"  # how the manifests of our bundles name who wrote them
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Kind:
    """What a directory is.

    Attributes:
        name: as messages have it.
        manifest: the file in it that tells ours from others'.
    """

    name: str
    manifest: str


BUNDLE = Kind("bundle", MANIFEST)


def check_destination(destination: Path, force: bool, kind: Kind = BUNDLE) -> None:
    """Refuse a destination that must not be replaced.

    Raises:
        UserError: it exists and `force` is not given, or it is not of this kind, or its parent is not a directory.
    """
    try:
        if destination.is_symlink() or destination.exists():
            if not force:
                raise UserError(
                    f"{destination} exists; choose another place, or replace the {kind.name} there with --force"
                )
            if destination.is_symlink() or not _is_ours(destination / kind.manifest):
                raise UserError(
                    f"{destination} is not a {kind.name}, so --force does not replace it; choose another place"
                )
        above = next(parent for parent in destination.absolute().parents if parent.exists())
    except OSError as error:
        raise UserError(f"{destination} cannot be looked at: {error.strerror}; choose another place") from error
    if not above.is_dir():
        raise UserError(f"{above} is not a directory, so {destination} cannot be made; choose another place")


@contextmanager
def staged(
    destination: Path, force: bool = False, *, kind: Kind = BUNDLE, beside: Path | None = None
) -> Iterator[Path]:
    """A temporary directory that becomes `destination` when the body succeeds and vanishes when it does not.

    An existing one is moved aside first and deleted last, so that there is a whole one at every moment but the
    two renames.

    Args:
        destination: of the directory.
        force: replace one of this kind.
        kind: of directory.
        beside: what the temporary directory lies next to (default: the destination); on the same file system.

    Raises:
        UserError: the destination must not be replaced, or cannot be written, or the disk is full.
    """
    check_destination(destination, force, kind)
    place = destination.resolve()  # no link is replaced; `.` has a name and a parent now
    made: list[Path] = []
    try:
        staging = _make_staging(place, place if beside is None else beside.resolve(), made)
        try:
            yield staging
            check_destination(destination, force, kind)  # something may have appeared there meanwhile
            _swap(staging, place, force, kind)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            raise UserError(
                f"cannot write {destination}: {error.strerror}; free space there, or choose another place"
            ) from error
        finally:
            _remove(staging)
    except BaseException:
        for directory in reversed(made):
            with suppress(OSError):  # someone else's file is in it by now
                directory.rmdir()
        raise


def _is_ours(path: Path) -> bool:
    """Whether this is a manifest that this tool wrote, of any version: other tools write that name too."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and str(manifest.get("tool")).split(" ")[0] == TOOL


def _make_staging(place: Path, beside: Path, made: list[Path]) -> Path:
    """Make the directory to write into, and the place's parents that do not exist, which are added to `made`."""
    try:
        for parent in reversed([parent for parent in place.parents if not parent.exists()]):
            parent.mkdir()
            made.append(parent)
        staging = beside.with_name(f".{beside.name}.{secrets.token_hex(4)}.partial")
        staging.mkdir()
    except OSError as error:
        raise UserError(f"cannot write beside {place}: {error.strerror}; choose another place or free space") from error
    return staging


def _swap(staging: Path, place: Path, force: bool, kind: Kind) -> None:
    """Rename the new directory in; the old one is back in its place where that does not happen."""
    old = staging.with_suffix(".old")
    try:
        if force and place.exists():
            place.rename(old)
        staging.rename(place)
    except BaseException as error:
        if old.exists() and not place.exists():
            old.rename(place)
        if isinstance(error, OSError):
            raise UserError(
                f"cannot rename the {kind.name} to {place}: {error.strerror}; choose another place"
            ) from error
        raise
    finally:
        if place.exists():
            _remove(old)


def _remove(directory: Path) -> None:
    """Remove a directory that may not exist, to the end even where the user interrupts it."""
    try:
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
