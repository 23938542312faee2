"""What some rows of a checkpoint's tensor become in the initializers that come from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.data_file import DataFile, Place
from exporter.origin import Origin
from exporter.rounding import SCALES, Rounding
from exporter.scaling import Scaling
from exporter.tensor_slices import all_finite, content
from runtime.errors import UserError

if TYPE_CHECKING:
    import torch


class Sink(Protocol):
    """Initializers that are filled from one tensor of the checkpoint."""

    @property
    def places(self) -> tuple[Place, ...]:
        """Where they lie."""
        ...

    @property
    def by_columns(self) -> bool:
        """Whether the tensor's rows go along their last axis; else along their first."""
        ...

    def fill(self, file: DataFile, start: int, rows: torch.Tensor) -> None:
        """Write what becomes of rows, of which the first has this index.

        Raises:
            UserError: they leave the range of the initializer's dtype.
            OSError: they cannot be written.
        """
        ...


@dataclass(frozen=True)
class Whole:
    """An initializer that is a tensor of the checkpoint, cast, scaled or transposed."""

    source: str
    origin: Origin
    dtype: ir.DataType
    place: Place
    scaling: Scaling

    @property
    def places(self) -> tuple[Place, ...]:
        """The one."""
        return (self.place,)

    @property
    def by_columns(self) -> bool:
        """Where it is transposed."""
        return self.origin.transposed

    def fill(self, file: DataFile, start: int, rows: torch.Tensor) -> None:
        """See `Sink.fill`."""
        import torch

        part = slice(start, start + len(rows))
        dtype: torch.dtype = getattr(torch, self.dtype.name.lower())
        tensor = self.origin.apply(rows, dtype, lambda name, found: self.scaling.apply(name, found, part))
        _check(all_finite(tensor), self.source, self.dtype)
        write = file.write_columns if self.by_columns else file.write_rows
        write(self.place, start, content(tensor))


@dataclass(frozen=True)
class Rounded:
    """The initializers that are parts of a matrix, rounded: by the parts' names, their dtypes and places."""

    tensor: str
    rounding: Rounding
    parts: dict[str, tuple[ir.DataType, Place]]
    scaling: Scaling

    @property
    def places(self) -> tuple[Place, ...]:
        """Those of the parts."""
        return tuple(place for _, place in self.parts.values())

    @property
    def by_columns(self) -> bool:
        """As the rounding has it."""
        return self.rounding.axis != 0

    def fill(self, file: DataFile, start: int, rows: torch.Tensor) -> None:
        """See `Sink.fill`."""
        scaled = self.scaling.apply(self.tensor, rows, slice(start, start + len(rows)))
        self.write(file, start, self.rounding.apply(scaled))

    def write(self, file: DataFile, start: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write the parts of rows, as `Rounding.apply` gives them."""
        for name, (dtype, place) in self.parts.items():
            array = arrays[name]
            if name == SCALES:
                array = array.astype(dtype.numpy())
                _check(bool(np.isfinite(array.astype(np.float32)).all()), self.tensor, dtype)
            data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            (file.write_columns if self.by_columns else file.write_rows)(place, start, data)


def _check(finite: bool, source: str, dtype: ir.DataType) -> None:
    if not finite:
        raise UserError(
            f"tensor {source} leaves the range of {dtype.name.lower()}; export with --precision bf16 or fp32"
        )
