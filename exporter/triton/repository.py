"""Writes a model repository of Triton: a model's directory with its description, its code and the bundle."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from exporter.staging import Kind, staged
from exporter.triton.config import CPU, GPU, Serving, config_text
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.manifest import MANIFEST, Engine
from runtime.session import check_placement

Progress = Callable[[str, int, int], None]

CONFIG = "config.pbtxt"
VERSION = "1"
BUNDLE = "bundle"  # beside model.py, which looks for it there
MODEL = Kind("model of nemotron-export", f"{VERSION}/{BUNDLE}/{MANIFEST}")
SLOTS = 8
EXTRAS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}  # of our distribution, by the backend they bring
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # what a URL and a directory can be


@dataclass(frozen=True)
class Packaged:
    """A model in a repository.

    Attributes:
        name: of the model.
        path: its directory.
        serving: how it is run.
        kind: of Triton's instance, `KIND_CPU` or `KIND_GPU`.
        extras: of our distribution, what the server's Python needs.
        bytes: that were copied.
    """

    name: str
    path: Path
    serving: Serving
    kind: str
    extras: tuple[str, ...]
    bytes: int


def package(
    path: Path,
    repository: Path,
    serving: Serving,
    *,
    name: str | None = None,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> Packaged:
    """Write a bundle into a model repository.

    Nothing appears in the repository before it is whole: a server that looks there loads even hidden directories, so
    the new one is written beside the repository and renamed in.

    Args:
        path: the bundle, of task text-generation; it is copied, with its engines.
        repository: the directory that holds models; made where it is missing.
        serving: how it is run; where it says no slots, there are 8, or what its engines have.
        name: of the model (default: the checkpoint's).
        force: replace the model of this name.
        progress: called with a stage, the bytes done and all of them.

    Raises:
        UserError: no bundle that generates text, nothing that runs it as it should be, a name that is none, or a
            destination that must not be replaced.
    """
    bundle = Bundle.open(path)
    bundle.check_task("text-generation")
    check_placement(bundle, serving.device)
    source = bundle.manifest.source
    name = _checked(source.name, "the checkpoint's name") if name is None else _checked(name, "--name")
    engines = _engines(bundle, serving)
    if serving.slots is None:
        serving = replace(serving, slots=min([SLOTS, *(engine.max_batch_size for engine in engines)]))
    kind = GPU if engines or serving.device == "cuda" else CPU
    flavors = {engine.flavor for engine in engines}
    extras = tuple(extra for flavor, extra in EXTRAS.items() if flavor in flavors) or ("gpu" if kind == GPU else "cpu",)
    here = repository.resolve()
    if here == here.parent or here.is_relative_to(path.resolve()):
        raise UserError(f"{repository} is no place for models; give a directory of its own, outside of the bundle")
    place = repository / name
    with staged(place, force, kind=MODEL, beside=repository) as staging:
        copied = _copy(bundle, staging / VERSION / BUNDLE, progress)
        shutil.copyfile(Path(__file__).with_name("model.py"), staging / VERSION / "model.py")
        (staging / CONFIG).write_text(config_text(name, serving, kind), encoding="utf-8")
    return Packaged(name, place, serving, kind, extras, copied)


def _checked(name: str, what: str) -> str:
    if _NAME.fullmatch(name) is None:
        raise UserError(
            f"{what} {name!r} cannot name a model; give --name with letters, digits, '.', '_' and '-', "
            "the first a letter or a digit"
        )
    return name


def _engines(bundle: Bundle, serving: Serving) -> list[Engine]:
    """The engines that may run it.

    Raises:
        UserError: it is to run on one, and there is none, or not on a GPU.
    """
    asked = serving.backend in EXTRAS
    if asked and serving.device == "cpu":
        raise UserError(f"{serving.backend} runs on the GPU; leave out --device cpu, or use --backend onnxruntime")
    found = [engine for engine in bundle.manifest.engines if serving.backend in ("auto", engine.flavor)]
    if asked and not found:
        raise UserError(
            f"{bundle.path} has no engine of {serving.backend}; build one: nemotron-export build {bundle.path} "
            f"--flavor {serving.backend}"
        )
    return [] if serving.device == "cpu" else found


def _copy(bundle: Bundle, target: Path, progress: Progress) -> int:
    """Copy the files that the manifest names, and the manifest; how many bytes those are."""
    files = bundle.manifest.files
    total, done = sum(record.bytes for record in files.values()), 0
    for name in [*files, MANIFEST]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.path / name, target / name)
        done += files[name].bytes if name in files else 0
        progress("copy", done, total)
    return total
