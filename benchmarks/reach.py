"""What the comparison is for: figures that this project should reach beside its peers, and whether it does.

A figure is a ratio of two numbers of one round, over all rounds; what counts is the quartile that is worse for us, the
lower of what should be large, the upper of what should be small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

OURS, GENAI, LLAMA, OPENVINO = "nemotron-export", "onnxruntime-genai", "llama.cpp", "openvino"
INT4 = (f"{OURS} int4 compact",)  # the recipe for speed; plain int4 has a scale for every 32 weights
Samples = Mapping[str, Mapping[str, Sequence[float]]]
"""Numbers by contender and measure, one of every round, or one alone.

Measures: `decode`, `batch`, `long` (tokens a second), `first_token` (seconds), `resident`, `peak`, `disk`, `step_bytes`
(bytes).
"""


@dataclass(frozen=True)
class Figure:
    """A limit to a ratio, or to a number where there is none to compare it with.

    Attributes:
        measure: of `Samples`.
        ours: contenders, of which the best in each round counts.
        theirs: the contender that it is compared with; None where `bound` is the number's own.
        bound: the limit.
        their_measure: where it is another than ours.
    """

    measure: str
    ours: tuple[str, ...]
    theirs: str | None
    bound: float
    their_measure: str | None = None

    @property
    def more_is_better(self) -> bool:
        """Speeds; seconds and bytes are to be few."""
        return self.measure in ("decode", "batch", "long")

    def __str__(self) -> str:
        ours = " or ".join(name.removeprefix(f"{OURS} ") for name in self.ours)
        sign = "≥" if self.more_is_better else "≤"
        if self.theirs is None:
            return f"{self.measure} {ours} {sign} {self.bound / 1e6:g} MB"
        theirs = self.theirs + (f"'s {self.their_measure}" if self.their_measure else "")
        return f"{self.measure} {ours} {sign} {self.bound:g} × {theirs}"


class Verdict(NamedTuple):
    """A figure's ratios and the quartile that counts; `value` is None where something was not measured."""

    figure: Figure
    ratios: list[float]
    value: float | None

    @property
    def met(self) -> bool | None:
        """None where something was not measured."""
        if self.value is None:
            return None
        return self.value >= self.figure.bound if self.figure.more_is_better else self.value <= self.figure.bound

    def to_json(self) -> dict[str, object]:
        """As in results."""
        ratios = [round(ratio, 4) for ratio in self.ratios]
        value = None if self.value is None else round(self.value, 4)
        return {"figure": str(self.figure), "bound": self.figure.bound, "value": value, "met": self.met, "all": ratios}


def _same_bits(measure: str, bounds: Mapping[str, float]) -> tuple[Figure, ...]:
    pairs = {"fp32": ((f"{OURS} fp32",), "F32"), "int8": ((f"{OURS} int8",), "Q8_0"), "int4": (INT4, "Q4_0")}
    return tuple(Figure(measure, pairs[name][0], f"{LLAMA} {pairs[name][1]}", bound) for name, bound in bounds.items())


FIGURES: dict[str, tuple[Figure, ...]] = {
    "242m": (
        *_same_bits("decode", {"fp32": 1.0, "int8": 1.1, "int4": 1.15}),
        *_same_bits("step_bytes", {"int4": 1.0}),
        *(
            Figure("decode", (f"{OURS} {name}",), f"{GENAI} {name}", bound)
            for name, bound in (("fp32", 1.5), ("int8", 1.8))
        ),
        Figure("decode", INT4, f"{GENAI} int4", 1.8),
        *_same_bits("long", {"int4": 1.0}),
        *_same_bits("first_token", {"fp32": 0.9, "int8": 0.9, "int4": 0.9}),
        Figure("first_token", (*INT4, f"{OURS} int8"), f"{OPENVINO} int4", 1.1),
        *_same_bits("batch", {"int4": 1.3}),
        Figure("batch", INT4, f"{OPENVINO} int4", 0.95),
        Figure("resident", INT4, None, 300e6),
    ),
    "minitron-4b": (
        *_same_bits("decode", {"int4": 1.1}),
        *_same_bits("first_token", {"int4": 0.9}),
        *_same_bits("resident", {"int4": 1.0}),
        Figure("resident", INT4, INT4[0], 1.15, "disk"),
    ),
}


def judge(figure: Figure, samples: Samples) -> Verdict:
    """A figure by what was measured."""
    best = max if figure.more_is_better else min
    found = [samples.get(name, {}).get(figure.measure, ()) for name in figure.ours]
    ours = [best(numbers) for numbers in zip(*filter(None, found), strict=True)]
    theirs: Sequence[float] = [1.0] * len(ours)
    if figure.theirs is not None:
        theirs = samples.get(figure.theirs, {}).get(figure.their_measure or figure.measure, ())
    if not ours or not theirs:
        return Verdict(figure, [], None)
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    return Verdict(figure, ratios, worse_quartile(ratios, figure.more_is_better))


def worse_quartile(ratios: Sequence[float], more_is_better: bool) -> float:
    """The lower quartile of what should be large, the upper of what should be small."""
    return float(np.percentile(ratios, 25 if more_is_better else 75))
