"""Weights go from the checkpoint into the bundle's external data, some rows of one tensor at a time."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from exporter.calibrated import Calibrated
from exporter.checkpoint import Checkpoint
from exporter.cost import ALIGNMENT, INLINE
from exporter.data_file import DataFile, Place, lay_out
from exporter.linked import external, link_files, linkable, read_linked
from exporter.origin import is_weight, origin_of, part_of
from exporter.parameters import EMBEDDING, weight_source
from exporter.scaling import Scaling
from exporter.tensor_slices import content
from exporter.weight_slices import Rounded, Sink, Whole
from runtime.manifest import FileRecord

if TYPE_CHECKING:
    import torch

_WORKERS = min(4, os.cpu_count() or 1)  # each holds a slice, and what it becomes

Progress = Callable[[int], None]


def weight_bytes(model: ir.Model) -> int:
    """Bytes that the graph's weights take."""
    weights = [value for value in model.graph.initializers.values() if is_weight(value)]
    return sum(math.prod(v.shape.numpy()) * v.dtype.bitwidth // 8 for v in weights if v.shape and v.dtype)


def write_weights(
    model: ir.Model,
    checkpoint: Checkpoint,
    path: Path,
    calibrated: Calibrated | None = None,
    progress: Progress = lambda _: None,
    *,
    link: bool = False,
) -> dict[str, FileRecord]:
    """Write every weight and large constant of the graph to `path` and let the graph refer to it.

    A tensor is read once, in slices, for all initializers that come from it. Slices become what the initializers hold,
    and are written, in threads, while the next ones are read; how many there are does not depend on the model.

    Args:
        model: the lowered graph; its initializers are given external tensors.
        checkpoint: where the weights come from.
        path: the data file, beside which model.onnx will stand.
        calibrated: factors that weights have, and matrices that are rounded already.
        progress: called with the bytes written so far, or read of what is linked.
        link: put the checkpoint's files beside the data file, for what they hold as it is.

    Returns:
        Sizes and hashes of the files by their names.

    Raises:
        UserError: a tensor is missing, misshapen, unreadable or not finite, or a file changes while it is read.
        OSError: the file cannot be written.
    """
    calibrated = calibrated or Calibrated(Scaling(checkpoint.spec))
    everything = list(model.graph.initializers.values())
    linked = linkable(everything, checkpoint, calibrated.scaling) if link else {}
    link_files(linked.values(), checkpoint, path.parent)
    values = [value for value in everything if _stored(value) and value not in linked]
    with DataFile(path) as file:
        places = dict(zip(values, lay_out(file, values, ALIGNMENT), strict=True))
        sources, rounded = _sinks(places, checkpoint, calibrated)
        written = _Written(file, progress)
        for value, place in places.items():
            if value.const_value is not None:
                file.write_rows(place, 0, memoryview(value.const_value.tobytes()))
                written.whole(place)
        for matrix in rounded:
            with calibrated.parts(matrix.tensor) as arrays:
                matrix.write(file, 0, arrays)
            written.whole(*matrix.places)
        _fill(file, sources, checkpoint, written)
        records = read_linked(linked.values(), checkpoint, written.count)
        checkpoint.check_unchanged()
        records[path.name] = file.record()
    for value, place in places.items():
        value.const_value = _external(value, path, place)
    for value, name in linked.items():
        value.const_value = external(value, name, checkpoint, path.parent)
    return records


def write_embeddings(checkpoint: Checkpoint, path: Path) -> FileRecord:
    """Write the embedding of every token, float32 [vocab, hidden], for graphs whose input is embeddings.

    Returns:
        The file's size and hash.
    """
    source = weight_source(EMBEDDING, checkpoint)
    with path.open("w+b") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": checkpoint.tensors[source].shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(0)
        digest = sha256(file.read())
        for _, rows in checkpoint.slices(source):
            data = content(rows.float())
            digest.update(data)
            file.write(data)
        return FileRecord(sha256=digest.hexdigest(), bytes=file.tell())


def _stored(value: ir.Value) -> bool:
    """Whether an initializer goes to the data file."""
    return is_weight(value) or (value.const_value is not None and value.const_value.nbytes > INLINE)


def _sinks(
    places: dict[ir.Value, Place], checkpoint: Checkpoint, calibrated: Calibrated
) -> tuple[dict[str, list[Sink]], list[Rounded]]:
    """What is filled from each of the checkpoint's tensors, and the matrices that calibration has rounded.

    Raises:
        UserError: a tensor is missing or misshapen.
    """
    sources: dict[str, list[Sink]] = {}
    matrices: dict[str, Rounded] = {}
    done = []
    for value, place in places.items():
        if value.const_value is not None:
            continue
        assert value.name is not None
        assert value.dtype is not None
        part = part_of(value)
        if part is None:
            origin = origin_of(value)
            source = weight_source(origin.tensor, checkpoint)
            checkpoint.require(source, origin.source_shape(place.shape))
            sources.setdefault(source, []).append(Whole(source, origin, value.dtype, place, calibrated.scaling))
            continue
        name, tensor = value.name.removesuffix(f".{part.name}"), part.matrix.tensor
        if name not in matrices:
            matrices[name] = Rounded(tensor, part.rounding, {}, calibrated.scaling)
            if tensor in calibrated.rounded:
                done.append(matrices[name])
            else:
                sources.setdefault(weight_source(tensor, checkpoint), []).append(matrices[name])
        matrices[name].parts[part.name] = value.dtype, place
    return sources, done


@dataclass(frozen=True)
class _Task:
    """Rows `start` to `end` of a tensor's `count`, on their way into initializers."""

    future: Future[None]
    sinks: list[Sink]
    start: int
    end: int
    count: int


def _fill(file: DataFile, sources: dict[str, list[Sink]], checkpoint: Checkpoint, written: _Written) -> None:
    """Read every source once and fill what comes from it, a few slices at a time under way."""
    under_way: deque[_Task] = deque()
    with _workers() as pool:
        for source, sinks in sources.items():
            count = checkpoint.tensors[source].shape[0]
            for start, rows in _slices(source, sinks, checkpoint):
                future = pool.submit(_fill_all, file, sinks, start, rows)
                under_way.append(_Task(future, sinks, start, start + len(rows), count))
                del rows
                if len(under_way) > _WORKERS:
                    written.rows(under_way.popleft())
        for task in under_way:
            written.rows(task)


def _fill_all(file: DataFile, sinks: list[Sink], start: int, rows: torch.Tensor) -> None:
    for sink in sinks:
        sink.fill(file, start, rows)


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Threads whose operators have one thread each; they have ended when the body is left, however it is."""
    import torch

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(_WORKERS, "weights", initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)


class _Written:
    """Counts bytes for the progress, and lets the file hash what is complete."""

    def __init__(self, file: DataFile, progress: Progress) -> None:
        self._file, self._progress = file, progress
        self._bytes = 0

    def count(self, more: int) -> None:
        """Bytes that are done."""
        self._bytes += more
        self._progress(self._bytes)

    def whole(self, *places: Place) -> None:
        """Places that have been filled at once."""
        for place in places:
            self._file.finished(place, place.size)
            self.count(place.size)

    def rows(self, task: _Task) -> None:
        """Wait for a task.

        Raises:
            UserError, OSError: it failed.
        """
        task.future.result()
        for sink in task.sinks:
            for place in sink.places:
                before, done = (place.size * row // task.count for row in (task.start, task.end))
                if not sink.by_columns or task.end == task.count:
                    self._file.finished(place, done)
                self.count(done - before)


def _slices(source: str, sinks: list[Sink], checkpoint: Checkpoint) -> Iterable[tuple[int, torch.Tensor]]:
    """A tensor's slices; all of it at once where two rows would share a byte of an initializer."""
    if not all(place.columns_are_bytes for sink in sinks if sink.by_columns for place in sink.places):
        return [(0, checkpoint.read(source))]
    return checkpoint.slices(source, wide=any(sink.by_columns and isinstance(sink, Whole) for sink in sinks))


def _external(value: ir.Value, path: Path, place: Place) -> ir.ExternalTensor:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    return ir.ExternalTensor(
        path.name, place.offset, place.size, value.dtype, shape=value.shape, name=value.name, base_dir=path.parent
    )
