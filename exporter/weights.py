"""Weights go from the checkpoint into the bundle's external data one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.calibrated import Calibrated
from exporter.checkpoint import Checkpoint
from exporter.origin import Origin, Part, is_weight, origin_of, part_of
from exporter.parameters import EMBEDDING, weight_source
from exporter.rounding import SCALES
from exporter.scaling import Scaling
from runtime.errors import UserError

ALIGNMENT = 4096  # a page, so that a runtime can map each tensor
INLINE_BYTES = 1024  # constants up to this size stay in model.onnx


def write_embeddings(checkpoint: Checkpoint, path: Path) -> None:
    """Write the embedding of every token, float32 [vocab, hidden], for graphs whose input is embeddings."""
    import numpy as np

    np.save(path, checkpoint.read(weight_source(EMBEDDING, checkpoint)).float().numpy(), allow_pickle=False)


def weight_bytes(model: ir.Model) -> int:
    """Bytes that the graph's weights take."""
    weights = [value for value in model.graph.initializers.values() if is_weight(value)]
    return sum(math.prod(v.shape.numpy()) * v.dtype.bitwidth // 8 for v in weights if v.shape and v.dtype)


def write_weights(
    model: ir.Model,
    checkpoint: Checkpoint,
    path: Path,
    calibrated: Calibrated | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Write every weight and large constant of the graph to `path` and let the graph refer to it.

    Memory is bounded by the largest tensor in fp32. The parts of a rounded matrix stand side by side among the
    initializers, so that it is read and rounded once.

    Args:
        model: the lowered graph; its initializers are given external tensors.
        checkpoint: where the weights come from.
        path: the data file, beside which model.onnx will stand.
        calibrated: factors that weights have, and matrices that are rounded already.
        progress: called with the bytes written after each tensor.

    Raises:
        UserError: a tensor is missing, misshapen, unreadable or not finite.
    """
    reader = _Reader(checkpoint, calibrated or Calibrated(Scaling(checkpoint.spec)))
    with path.open("wb") as file:
        for value in model.graph.initializers.values():
            assert value.name is not None
            if is_weight(value):
                value.const_value = _append(file, path, value, reader.content(value))
            elif value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
                value.const_value = _append(file, path, value, memoryview(value.const_value.tobytes()))
            else:
                continue
            progress(file.tell())


class _Reader:
    """Reads what initializers hold; of the matrix that was rounded last, all parts are kept."""

    def __init__(self, checkpoint: Checkpoint, calibrated: Calibrated) -> None:
        self._checkpoint, self._calibrated = checkpoint, calibrated
        self._rounded: tuple[Part, dict[str, NDArray[Any]]] | None = None

    def content(self, value: ir.Value) -> memoryview:
        """The bytes of an initializer.

        Raises:
            UserError: its tensor is missing, misshapen, unreadable, or leaves the initializer's range.
        """
        part = part_of(value)
        return self._whole(value) if part is None else self._part(value, part)

    def _whole(self, value: ir.Value) -> memoryview:
        assert value.shape is not None
        assert value.dtype is not None
        origin = origin_of(value)
        source = self._source(origin, origin.source_shape(tuple(int(dim) for dim in value.shape.numpy())))
        import torch

        dtype: torch.dtype = getattr(torch, value.dtype.name.lower())
        tensor = origin.apply(self._checkpoint.read(source), dtype, self._calibrated.scaling.apply)
        self._check(bool(torch.isfinite(tensor).all()), source, value.dtype)
        return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)

    def _part(self, value: ir.Value, part: Part) -> memoryview:
        assert value.dtype is not None
        if self._rounded is None or replace(self._rounded[0], name=part.name) != part:
            self._rounded = part, self._calibrated.parts(part.matrix.tensor) or self._round(part)
        array = self._rounded[1][part.name]
        if part.name == SCALES:
            array = array.astype(value.dtype.numpy())
            self._check(bool(np.isfinite(array.astype(np.float32)).all()), part.matrix.tensor, value.dtype)
        return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def _round(self, part: Part) -> dict[str, NDArray[Any]]:
        name = part.matrix.tensor
        matrix = self._checkpoint.read(weight_source(name, self._checkpoint))
        return part.rounding.apply(self._calibrated.scaling.apply(name, matrix))

    def _source(self, origin: Origin, shape: tuple[int, ...]) -> str:
        source = weight_source(origin.tensor, self._checkpoint)
        self._checkpoint.require(source, shape)
        return source

    @staticmethod
    def _check(finite: bool, source: str, dtype: ir.DataType) -> None:
        if not finite:
            raise UserError(
                f"tensor {source} leaves the range of {dtype.name.lower()}; export with --precision bf16 or fp32"
            )


def _append(file: BinaryIO, path: Path, value: ir.Value, data: memoryview) -> ir.ExternalTensor:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    file.seek(offset)
    file.write(data)
    return ir.ExternalTensor(
        path.name, offset, data.nbytes, value.dtype, shape=value.shape, name=value.name, base_dir=path.parent
    )
