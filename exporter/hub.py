"""From what a user calls a checkpoint to its directory: itself, or a hub id's snapshot, downloaded or cached."""

from __future__ import annotations

from pathlib import Path

from exporter.tensor_files import INDEX, PICKLE_INDEX, SINGLE
from runtime.errors import UserError
from runtime.manifest import CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG

# What is read of a repository, none of it code. Pickles are downloaded only where there is nothing else.
_DESCRIPTIONS = (CONFIG, GENERATION_CONFIG, CHAT_TEMPLATE)
_TOKENIZER = ("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
_SAFETENSORS = ("*.safetensors", INDEX)
_PICKLES = ("pytorch_model*.bin", PICKLE_INDEX)
_SUBFOLDERS = "*/*"


def locate(checkpoint: Path | str, revision: str | None = None) -> Path:
    """The directory of a checkpoint; a hub id's snapshot is downloaded, or found in the cache where no hub is reached.

    Args:
        checkpoint: a directory, or an id (`name` or `organisation/name`) where there is no such directory.
        revision: branch, tag or commit of an id (default: main).

    Raises:
        UserError: neither a directory nor an id that is found, a revision of a directory, or no access.
    """
    check_name(checkpoint)
    if not Path(checkpoint).is_dir():
        return _snapshot(str(checkpoint), revision)
    if revision is not None:
        raise UserError(f"{checkpoint} is a directory, which has no revision {revision}; drop --revision")
    return Path(checkpoint)


def check_name(checkpoint: Path | str) -> None:
    """Refuse what is no directory and cannot be a hub id either, without asking the hub.

    Raises:
        UserError: it is such.
    """
    path = Path(checkpoint)
    if not path.is_dir() and (path.exists() or not _is_repository_id(str(checkpoint))):
        raise UserError(f"{checkpoint} is not a directory; download the checkpoint first (`hf download …`)")


def repository_name(directory: Path) -> str | None:
    """The repository's name, without its organisation, where a directory is a snapshot in the hub's cache."""
    repository = directory.parent.parent.name  # models--<organisation>--<name>/snapshots/<commit>
    if directory.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.rpartition("--")[2]


def _is_repository_id(text: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _snapshot(identifier: str, revision: str | None) -> Path:
    files = (*_DESCRIPTIONS, *_TOKENIZER, *_SAFETENSORS)
    directory = _download(identifier, revision, files)
    if (directory / SINGLE).is_file() or (directory / INDEX).is_file():
        return directory
    return _download(identifier, revision, (*files, *_PICKLES))


def _download(identifier: str, revision: str | None, files: tuple[str, ...]) -> Path:
    from httpx2 import HTTPError  # what huggingface_hub lets through where a connection breaks off
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = identifier if revision is None else f"{identifier} (revision {revision})"
    try:
        return Path(
            snapshot_download(identifier, revision=revision, allow_patterns=list(files), ignore_patterns=[_SUBFOLDERS])
        )
    except RevisionNotFoundError as error:
        raise UserError(f"{identifier} has no revision {revision}; give a branch, tag or commit of it") from error
    except GatedRepoError as error:
        raise UserError(
            f"{identifier} is gated; accept its terms at the hub, and log in there (`hf auth login`)"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{identifier} is not a directory, and the hub shows no such repository; correct it, or log in where it is "
            "private (`hf auth login`)"
        ) from error
    except LocalEntryNotFoundError as error:  # the hub is not reached, and the cache has none or a part of it
        raise UserError(
            f"{named} is not a directory, the hub cannot be reached and the cache has no whole snapshot of it; "
            f"correct the path, or download it first where there is a network (`hf download {identifier}`)"
        ) from error
    except HTTPError as error:
        raise UserError(f"{named} cannot be downloaded ({_line(error)}); try again") from error


def _line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
