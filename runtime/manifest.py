"""`manifest.json`: what a bundle is, where it came from, what was checked, and every file beside it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from runtime.errors import UserError
from runtime.measured import Calibration, Parity, Quality
from runtime.records import Record

SCHEMA = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
GENAI_CONFIG = "genai_config.json"  # what onnxruntime-genai runs the directory by
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
GOLDEN = "golden.npz"
KV_SCALES = "kv_scales.npz"  # of a rounded cache
ENGINES = "engines"  # a directory
PLAN = "model.plan"  # in a directory of its own under that


@dataclass(frozen=True, kw_only=True)
class Source(Record):
    """The checkpoint: its name, the sha256 over its sorted tensors, and the name of the adapter merged into it."""

    name: str
    fingerprint: str
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class TensorSpec(Record):
    """A graph input or output; dtype is numpy's name, a symbolic dimension is text."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Graph(Record):
    """The graph's tensors, in its order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class PassRecord(Record):
    """A pass that ran and how many places it changed."""

    name: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Lowering(Record):
    """The form the fused op took, and what could not take it."""

    attention: str
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Quantization(Record):
    """Weights of few bits: the recipe, the dtype of everything else, and how many matrices are rounded how."""

    recipe: str
    activations: str
    matrices: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class FileRecord(Record):
    """A file's content: hexadecimal sha256 and length in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Engine(Record):
    """A TensorRT engine of the bundle's graph, and what it was built for.

    Attributes:
        path: the plan's file, as `files` names it.
        flavor: "tensorrt" or "tensorrt-rtx"; `version` is that of the package that built it.
        capabilities: compute capabilities of the GPUs that it runs on, as "8.9".
        max_batch_size, max_input_len: the most rows, and tokens of a row, that a step may have.
        max_seq_len: the cache's capacity, which is fixed.
        max_kept: the most positions of a row that a step gives logits of.
        precision: the graph's.
        causality: "lower-right" or "mask".
        attention: "native", TensorRT's layers, or "plugin", kernels that are in the engine.
        graph_sha256: of the graph it was built from.
        flags: how it was built beyond its shapes: "weight-streaming", "strip", …
        assumptions: what it relies on that nobody has written down.
        selftested_on: devices on which the golden cases are known to have passed. Nothing here fills it: a bundle may
            be read-only where it runs, and what has passed is remembered in the user's cache directory.
    """

    path: str
    flavor: str
    version: str
    capabilities: tuple[str, ...]
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_kept: int
    precision: str
    causality: str
    graph_sha256: str
    attention: str = "native"
    flags: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    selftested_on: tuple[str, ...] = ()

    def rebuild(self, bundle: Path) -> str:
        """The command that builds it again, with the attention that it has."""
        attention = "" if self.attention == "native" else f" --attention {self.attention}"
        return f"nemotron-export build {bundle} --flavor {self.flavor}{attention} --force"


@dataclass(frozen=True, kw_only=True)
class Manifest(Record):
    """`manifest.json`: what the bundle is, where it came from, what was checked, and every file beside it.

    Attributes:
        step_bytes: of the weights that any one step reads whole; of the embedding and the rotary tables it reads rows.
    """

    schema: int = SCHEMA
    tool: str
    created: str
    source: Source
    task: str
    target: str
    precision: str
    quantization: Quantization | None = None
    kv_cache: str | None = None
    calibration: Calibration | None = None
    opset: int
    max_length: int
    graph: Graph
    step_bytes: int | None = None
    passes: tuple[PassRecord, ...] = ()
    lowering: Lowering | None = None
    parity: Parity | None = None
    quality: Quality | None = None
    engines: tuple[Engine, ...] = ()
    files: dict[str, FileRecord] = field(default_factory=dict)

    @property
    def activations(self) -> str:
        """The precision of activations and cache: "fp32", "fp16" or "bf16"."""
        return self.precision if self.quantization is None else self.quantization.activations

    @property
    def precisions(self) -> frozenset[str]:
        """Every precision that a tensor of the graph has: of activations and cache, and of rounded weights."""
        return frozenset((self.activations, *(self.quantization.matrices if self.quantization else ())))

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the manifest of a bundle's directory.

        Raises:
            UserError: no manifest, not JSON, another schema, a missing or mistyped field, or a file outside.
        """
        path = directory / MANIFEST
        data = read_json(path)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else None
            raise UserError(
                f"{path} has schema {found!r}, this version reads {SCHEMA}; "
                "upgrade nemotron-export, or export the bundle again"
            )
        manifest = cls.from_json(data, str(path))
        for name in manifest.files:
            _check_inside(directory, name)
        if manifest.max_length < 1:
            raise UserError(f"{path}.max_length should be at least 1, found {manifest.max_length}")
        return manifest

    def save(self, directory: Path) -> None:
        """Replace the manifest that is there: a reader sees the old or the new, never half of one.

        Raises:
            UserError: the file cannot be written.
        """
        path = directory / MANIFEST
        partial = directory / f"{MANIFEST}.{os.getpid()}.partial"
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            reason = f"cannot write {path}: {error.strerror}"
            raise UserError(f"{reason}; free space or choose another place") from error
        finally:
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        UserError: missing, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; copy or export the bundle again") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); copy or export the bundle again") from error


def _check_inside(directory: Path, name: str) -> None:
    """Refuse a file name that could lead out of the bundle, by its own words or through a link."""
    pure = PurePosixPath(name)
    plain = bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts and "\\" not in name
    if not plain or not (directory / name).resolve().is_relative_to(directory.resolve()):
        raise UserError(
            f"{directory / MANIFEST} names {name!r}, which leads out of the bundle; "
            "copy the bundle with its files (cp -rL) instead of links"
        )
