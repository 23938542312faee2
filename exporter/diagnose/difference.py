"""How far a tensor is from what it should be, and how far it may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from exporter.yardstick import LARGEST_FACTOR, YARDSTICKS

Tensor = torch.Tensor

FLOOR = 1e-5  # of the largest magnitude, in fp32: other orders of summation come to a tenth of it
FLOOR_NORM = 3e-6  # of a norm, whose sums are short
UNITS = 2.0  # of rounding at 16 bit, of the largest magnitude


@dataclass(frozen=True)
class Difference:
    """Of one tensor of a row.

    Attributes:
        max_abs: the largest difference; infinite where either is not finite.
        relative: of the largest magnitude that is expected.
        cosine: of both, as one vector each.
        size: the largest magnitude that is expected.
        limit: what max_abs may be; None where nothing is judged.
        by_position: the largest difference at each position, relative.
    """

    max_abs: float
    relative: float
    cosine: float
    size: float
    limit: float | None
    by_position: tuple[float, ...]

    @property
    def passed(self) -> bool:
        """Whether it is within its limit."""
        return self.limit is None or self.max_abs <= self.limit

    def to_json(self) -> dict[str, Any]:
        """For the command's JSON object; null for what is not finite."""
        return {
            "max_abs": finite(self.max_abs),
            "relative": finite(self.relative),
            "cosine": finite(self.cosine),
            "limit": None if self.limit is None else finite(self.limit),
            "passed": self.passed,
        }


def finite(value: float) -> float | None:
    """A number as JSON has it."""
    return value if abs(value) < float("inf") else None


def difference(ours: Tensor, exact: Tensor, limit: float | None = None) -> Difference:
    """Compare [tokens, …] with what it should be."""
    ours, exact = ours.reshape(len(ours), -1).double(), exact.reshape(len(exact), -1).double()
    apart = error(ours, exact)
    size = max(float(exact.abs().nan_to_num(posinf=0.0).max()), torch.finfo(torch.float32).tiny)
    by_position = torch.where((ours - exact).isfinite(), (ours - exact).abs(), torch.inf).amax(1) / size
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), exact.flatten(), dim=0)
    return Difference(apart, apart / size, float(cosine), size, limit, tuple(by_position.tolist()))


def error(ours: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite where one is not a number."""
    apart = (ours.double() - exact.double()).abs()
    return float(apart.max()) if bool(apart.isfinite().all()) else float("inf")


def limit_of(exact: Tensor, yardstick: Tensor, precision: str, *, norm: bool = False) -> float:
    """How far a tap may be from what transformers makes of the same input in fp32.

    Args:
        exact: that.
        yardstick: what transformers makes of it in another dtype; see `exporter.yardstick`.
        precision: of the bundle's activations.
        norm: whether it is a norm's output.
    """
    size, apart = float(exact.abs().max()), error(yardstick, exact)
    if precision == "fp32":
        return max(3 * apart, (FLOOR_NORM if norm else FLOOR) * size)
    unit = torch.finfo(YARDSTICKS[precision]).eps
    return max(LARGEST_FACTOR * apart, UNITS * unit * size)
