"""Which bundles of a directory run on this machine, on what, and why not; nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.manifest import MANIFEST
from runtime.session import check_runs

# Names as results have them, with what `--backend` and `--device` ask for.
PLACES = {
    "onnxruntime-cpu": ("onnxruntime", "cpu"),
    "onnxruntime-cuda": ("onnxruntime", "cuda"),
    "tensorrt": ("tensorrt", None),
    "tensorrt-rtx": ("tensorrt-rtx", None),
}


def find_bundles(directory: Path) -> list[Path]:
    """The bundles of a directory, by their manifests: those in it, or itself.

    Raises:
        UserError: it does not exist, or is a file.
    """
    if not directory.exists():
        raise UserError(f"{directory} does not exist; give a directory that holds bundles")
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory; give one that holds bundles")
    if (directory / MANIFEST).is_file():
        return [directory]
    return sorted(path.parent for path in directory.glob(f"*/{MANIFEST}"))


def examine_bundle(path: Path) -> dict[str, Any]:
    """An object of `bundles` of the command `doctor`; of one that cannot be opened, "error" says why."""
    try:
        bundle = Bundle.open(path)
    except UserError as error:
        return {"path": str(path), "error": str(error)}
    manifest = bundle.manifest
    return {
        "path": str(path),
        "task": manifest.task,
        "target": manifest.target,
        "precision": manifest.precision,
        "runs": [_verdict(bundle, name) for name in PLACES],
    }


def _verdict(bundle: Bundle, name: str) -> dict[str, Any]:
    backend, device = PLACES[name]
    try:
        check_runs(bundle, backend, device)
    except UserError as error:
        return {"backend": name, "runs": False, "why": str(error)}
    return {"backend": name, "runs": True, "why": None}
