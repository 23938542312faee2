"""The bundle: a directory with a graph, its tokenizer, and a manifest that names every file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from runtime.contract import LOGITS, past_names
from runtime.errors import CheckFailed, UserError
from runtime.manifest import CONFIG, GENERATION_CONFIG, MANIFEST, FileRecord, Manifest, read_json

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class CacheGeometry:
    """The cache the graph wants: per layer a key and a value [slots, kv_heads, capacity, head_dim]."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """What one more token of one row takes."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file its manifest names is there and has the size it should."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a bundle's directory and check that it is whole (names and sizes; hashes by `check_hashes`).

        Raises:
            UserError: not a directory, not a bundle, another schema, a file missing or of another size.
        """
        path = Path(path)
        _check_is_bundle(path)
        bundle = cls(path, Manifest.load(path))
        for name, record in bundle.manifest.files.items():
            file = path / name
            if not file.is_file():
                raise UserError(f"{file} is missing; copy the bundle again, or export it again")
            if (size := file.stat().st_size) != record.bytes:
                raise UserError(
                    f"{file} has {size} bytes, its manifest says {record.bytes}; "
                    "copy the bundle again, or export it again"
                )
        return bundle

    def check_task(self, task: str) -> None:
        """Refuse a bundle that was exported for something else.

        Raises:
            UserError: names the command that runs it.
        """
        if self.manifest.task != task:
            command = "generate" if self.manifest.task == "text-generation" else "predict"
            raise UserError(
                f"{self.path} is for {self.manifest.task}, not {task}; use nemotron-export {command}, "
                f"or export it with --task {task}"
            )

    def has(self, name: str) -> bool:
        """Whether the manifest names this file."""
        return name in self.manifest.files

    def file(self, name: str) -> Path:
        """Where a file of the bundle is.

        Raises:
            UserError: the manifest does not name it.
        """
        if not self.has(name):
            raise UserError(f"{self.path} has no {name}; export the bundle again")
        return self.path / name

    def changed_files(self) -> list[str]:
        """Names of the files whose content is not what the manifest says. Reads every byte of the bundle."""
        return [n for n, record in self.manifest.files.items() if sha256_of(self.path / n) != record.sha256]

    def check_hashes(self) -> None:
        """Compare every file's content with the manifest.

        Raises:
            CheckFailed: a file differs.
        """
        if changed := self.changed_files():
            raise CheckFailed(
                f"{self.path}: {', '.join(changed)} differ from the manifest's sha256; copy the bundle again"
            )

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The checkpoint's own Hugging Face configuration."""
        return _read_object(self.file(CONFIG))

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:
        """The checkpoint's generation defaults; empty where it has none."""
        return _read_object(self.file(GENERATION_CONFIG)) if self.has(GENERATION_CONFIG) else {}

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Token ids that end a text: from generation_config.json, else from config.json, else none."""
        source = self.generation_config if "eos_token_id" in self.generation_config else self.config
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in ids):
            raise UserError(f"{self.path}: eos_token_id should be an integer or a list, found {value!r}")
        return frozenset(ids)

    @property
    def vocab_size(self) -> int:
        """Token ids the model knows: for text-generation the last dimension of its logits, else config.json's.

        Raises:
            UserError: neither says.
        """
        if self.manifest.task != "text-generation":
            size = self.config.get("vocab_size")
            if not isinstance(size, int):
                raise UserError(
                    f"{self.path}: vocab_size should be an integer, found {size!r}; export the bundle again"
                )
            return size
        logits = next((spec for spec in self.manifest.graph.outputs if spec.name == LOGITS), None)
        size = logits.shape[-1] if logits is not None else None
        if not isinstance(size, int):
            raise UserError(f"{self.path} declares no {LOGITS} of fixed width; export the bundle again")
        return size

    @property
    def input_names(self) -> frozenset[str]:
        """Names of the graph's inputs."""
        return frozenset(spec.name for spec in self.manifest.graph.inputs)

    @property
    def has_cache(self) -> bool:
        """Whether the graph takes a key/value cache; one that does not computes whole rows each time."""
        return any(name in self.input_names for name in past_names(0))

    @property
    def cache_geometry(self) -> CacheGeometry:
        """Layers, heads and dtype of the cache, from the graph's past inputs.

        Raises:
            UserError: the graph has no cache, or its layers differ.
        """
        inputs = {spec.name: spec for spec in self.manifest.graph.inputs}
        layers = 0
        while all(name in inputs for name in past_names(layers)):
            layers += 1
        specs = [inputs[name] for layer in range(layers) for name in past_names(layer)]
        found = {(spec.shape[1], spec.shape[3], spec.dtype) for spec in specs if len(spec.shape) == 4}
        match list(found):
            case [(int(kv_heads), int(head_dim), dtype)]:
                return CacheGeometry(layers, kv_heads, head_dim, dtype)
        raise UserError(
            f"{self.path} declares no uniform key/value cache; export for text-generation, and without --no-cache"
        )


def describe_files(
    directory: Path, skip: Iterable[str] = (MANIFEST,), known: Mapping[str, FileRecord] | None = None
) -> dict[str, FileRecord]:
    """The `files` of a manifest: every file under the directory by its relative name, with hash and size.

    Args:
        directory: of the bundle.
        skip: names of files that are left out.
        known: records of files that were hashed before, and are not read again.
    """
    known = known or {}
    names = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    return {name: known.get(name) or _describe(directory / name) for name in names if name not in set(skip)}


def _describe(path: Path) -> FileRecord:
    return FileRecord(sha256=sha256_of(path), bytes=path.stat().st_size)


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_object(path: Path) -> Mapping[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} should hold a JSON object; export the bundle again")
    return data


def _check_is_bundle(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path} does not exist; write a bundle: nemotron-export export CHECKPOINT {path}")
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give the one that nemotron-export export wrote")
    if not (path / MANIFEST).is_file():
        kind = "a checkpoint, not a bundle" if (path / CONFIG).is_file() else f"not a bundle, it has no {MANIFEST}"
        raise UserError(f"{path} is {kind}; nemotron-export export CHECKPOINT BUNDLE writes one")
