"""Before any work, and before torch is loaded: whether disk and memory can suffice at all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.cost import Model, bundle_bytes, data_bytes, least_peak_bytes, model_of
from exporter.memory import available_memory, size
from exporter.parameters import EMBEDDING, shapes_in
from exporter.recipe import Precision, precision_of, read_recipe
from exporter.spec import read_config
from exporter.tensor_files import read_checkpoint_headers
from runtime.errors import UserError

if TYPE_CHECKING:
    from exporter.plan import ExportOptions


def check_room(checkpoint: Path, destination: Path, asked: ExportOptions) -> None:
    """Refuse an export for which the destination's disk or the memory certainly cannot suffice.

    Reads headers and `config.json` alone, without torch where the weights are safetensors. Of the bundle only the
    weights are counted, of memory what the narrowest way through takes.

    Args:
        checkpoint: the checkpoint's directory.
        destination: where the bundle goes. One that is there stays until the new one is whole, so it makes no room.
        asked: what to export; those fields count that size follows from.

    Raises:
        UserError: it cannot; or the checkpoint, the recipe or the precision is refused already.
    """
    precision = precision_of(asked.target, asked.precision, read_recipe(asked.recipe))
    precision = replace(precision, fp16_safe=asked.fp16_safe, kv_cache=asked.kv_cache)
    config = read_config(checkpoint)
    model = model_of(shapes_in(read_checkpoint_headers(checkpoint)), asked.task, config)
    model = replace(model, embeds=asked.inputs == "embeds" and EMBEDDING in model.shapes)
    if asked.weights != "link":  # which writes next to nothing
        _check_disk(model, precision, destination)
    _check_memory(model, precision, asked)


def free_disk(destination: Path) -> tuple[Path, int]:
    """The nearest directory above a place that exists, and the bytes that are free there."""
    above = next(parent for parent in destination.absolute().parents if parent.exists())
    return above, shutil.disk_usage(above).free


def _check_disk(model: Model, precision: Precision, destination: Path) -> None:
    above, free = free_disk(destination)
    if data_bytes(model, precision) > free:
        raise UserError(
            f"the bundle needs {size(bundle_bytes(model, precision))} at {precision.name}, {above} has "
            f"{size(free)} free; free space there, choose another place, or a lower precision: "
            "nemotron-export plan shows what each takes"
        )


def _check_memory(model: Model, precision: Precision, asked: ExportOptions) -> None:
    memory = available_memory() if asked.memory is None else asked.memory
    least = least_peak_bytes(model, precision, gate=asked.verify)
    if least > memory:
        remedy = "export on a larger machine" if asked.memory is None else "raise --memory"
        if asked.verify and not precision.calibrated:
            remedy += ", or check it on another (--no-verify)"
        raise UserError(
            f"the export needs at least {size(least)} of memory, {size(memory)} "
            f"{'are available' if asked.memory is None else 'are given'}; {remedy}; "
            "nemotron-export plan shows what each precision takes"
        )
