"""The hub's cache as huggingface_hub lays it out, filled without the hub."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_snapshot(cache: Path, identifier: str, files: Path, *, commit: str = COMMIT, ref: str = "main") -> Path:
    """Put a directory's files into the cache as the snapshot of a repository's commit, which `ref` names."""
    repository = cache / f"models--{identifier.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for directory in (snapshot, repository / "blobs", repository / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    for file in files.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    (repository / "refs" / ref).write_text(commit)
    return snapshot
