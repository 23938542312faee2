"""What a calibration text has decided about a model's weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.scaling import Scaling
from runtime.cache_scales import CacheScales
from runtime.manifest import KV_SCALES
from runtime.measured import Calibration


@dataclass(frozen=True)
class Calibrated:
    """What was decided.

    Attributes:
        scaling: the model's factors.
        rounded: files of the parts of matrices that were rounded, by their names, all in one directory.
        cache_scales: of a rounded cache; None where it is as activations are.
        record: for the manifest; None where there was nothing to decide.
    """

    scaling: Scaling
    rounded: Mapping[str, Path] = field(default_factory=dict)
    cache_scales: CacheScales | None = None
    record: Calibration | None = None

    @contextmanager
    def parts(self, tensor: str) -> Iterator[Mapping[str, NDArray[Any]]]:
        """The parts of a matrix that was rounded, as `Rounding.apply` gives them, each read when it is asked for."""
        with np.load(self.rounded[tensor], allow_pickle=False) as file:
            yield file

    def save(self, directory: Path) -> None:
        """Once weights are written: leave factors and scales in the bundle, and remove the rounded matrices."""
        if self.scaling.factors:
            self.scaling.save(directory)
        if self.cache_scales is not None:  # the graph has them too: these are what the gate checks its by
            self.cache_scales.save(directory / KV_SCALES)
        for place in {path.parent for path in self.rounded.values()}:
            shutil.rmtree(place)
