"""How far an export may be from transformers in fp32: as far as rounding leads transformers itself.

A yardstick is a second run of transformers on the same tokens. For fp32 it is fp64, which shows the reference's own
error. For 16 bit it is transformers at that precision, which shows what the precision costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.reference import Batch, Forward, Reference, Row
from runtime.measured import Comparison

LIMIT = 1e-4  # of |Δ| in fp32, unless the reference itself is further than a third of it from fp64
KL_FACTOR = 1.5  # of transformers' mean divergence at that precision
# Of transformers' largest |Δ| at that precision: the largest of many differences scatters more than their mean does.
LARGEST_FACTOR = 2.0

Array = NDArray[np.floating]
Outputs = dict[str, Array]
HIDDEN_STATES = "hidden_states"  # the residual stream, as comparisons call it
YARDSTICKS = {"fp32": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Expected:
    """One row: what transformers gives in fp32, and what the yardstick gives."""

    exact: Forward
    yardstick: Forward


class Yardstick:
    """Runs rows through transformers in fp32 and at a precision's yardstick."""

    def __init__(self, reference: Reference, precision: str) -> None:
        self._reference = reference
        self._dtype = YARDSTICKS[precision]

    def outputs(self, batches: Sequence[Batch]) -> list[tuple[Outputs, Outputs]]:
        """Run batches without a cache: what transformers gives in fp32, and what the yardstick gives."""
        exact = self._reference.outputs(batches)
        yardstick = self._reference.outputs(batches, self._dtype)
        finite = all(np.isfinite(array).all() for found in yardstick for array in found.values())
        if self._dtype == torch.float16 and not finite:
            yardstick = self._reference.outputs(batches, torch.bfloat16)
        return list(zip(exact, yardstick, strict=True))

    def forwards(self, rows: Sequence[Row]) -> list[Expected]:
        """Run rows; where transformers in fp16 is not finite on any, bf16 is the yardstick of all."""
        exact = self._reference.forwards(rows)
        yardstick = self._reference.forwards(rows, self._dtype)
        if self._dtype == torch.float16 and not all(forward.finite for forward in yardstick):
            yardstick = self._reference.forwards(rows, torch.bfloat16)
        return [Expected(*pair) for pair in zip(exact, yardstick, strict=True)]


@dataclass
class _Largest:
    """The largest |ours − exact|, |yardstick − exact| and |exact| of one kind of tensor in one case."""

    ours: float = 0.0
    yardstick: float = 0.0
    exact: float = 0.0


@dataclass
class Ledger:
    """What the gate has compared so far.

    Attributes:
        precision: of activations and cache.
        over_vocabulary: whether logits are of tokens, whose divergence counts in 16 bit. That of a head's few labels
            over a few rows scatters too much for a mean to say anything; their largest |Δ| is compared as all else is.
    """

    precision: str
    over_vocabulary: bool = True
    _largest: dict[tuple[str, str], _Largest] = field(default_factory=dict)
    _divergence: list[tuple[Array, Array]] = field(default_factory=list)

    def add(self, name: str, case: str, ours: Array, expected: Expected, pick: Callable[[Forward], Array]) -> None:
        """Note the differences of one tensor; `pick` takes what it should be from a forward pass."""
        self.note(name, case, ours, pick(expected.exact), pick(expected.yardstick))

    def note(self, name: str, case: str, ours: Array, exact: Array, yardstick: Array) -> None:
        """Note the differences of one tensor, all three of one shape."""
        row = self._largest.setdefault((name, case), _Largest())
        row.ours = float(np.maximum(row.ours, np.abs(ours - exact).max(initial=0.0)))  # keeps what is not a number
        row.yardstick = float(np.maximum(row.yardstick, np.abs(yardstick - exact).max(initial=0.0)))
        row.exact = max(row.exact, float(np.abs(exact).max(initial=0.0)))
        if name == "logits" and self.over_vocabulary and self.precision != "fp32":
            self._divergence.append((_divergence(exact, ours), _divergence(exact, yardstick)))

    def comparisons(self) -> list[Comparison]:
        """As records; a difference that is not a number never passes."""
        found = [
            compare(name, case, "max_abs", row.ours, self._limit(name, row))
            for (name, case), row in self._largest.items()
        ]
        if self._divergence:
            ours, yardstick = (float(np.concatenate(side).mean()) for side in zip(*self._divergence, strict=True))
            found.append(compare("logits", "all", "kl_mean", ours, KL_FACTOR * yardstick))
        return found

    def _limit(self, name: str, row: _Largest) -> float:
        """fp32: by this case's own yardstick. 16 bit: by that of all cases, and at least one rounding unit."""
        if self.precision == "fp32":
            return max(LIMIT, 3 * row.yardstick)
        rows = [other for (kind, _), other in self._largest.items() if kind == name]
        unit = torch.finfo(YARDSTICKS[self.precision]).eps * max(other.exact for other in rows)
        return max(LARGEST_FACTOR * max(other.yardstick for other in rows), unit)


def compare(name: str, case: str, metric: str, value: float, limit: float) -> Comparison:
    """A comparison that passes where the value is a number within the limit."""
    finite = bool(np.isfinite(value))
    return Comparison(
        name=name,
        case=case,
        metric=metric,
        value=value if finite else None,
        limit=limit,
        passed=finite and value <= limit,
    )


def _divergence(exact: Array, other: Array) -> Array:
    """KL(softmax(exact) ‖ softmax(other)) in nats at every position: [positions, vocab] gives [positions]."""
    p, q = _log_softmax(exact), _log_softmax(other)
    result: Array = (np.exp(p) * (p - q)).sum(-1)
    return result


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
