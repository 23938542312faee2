"""Records of a bundle's manifest that were measured: parity with the checkpoint, quality, and what a text decided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.records import Record

NO_LIMIT = 1e9  # of what is told and not judged


@dataclass(frozen=True, kw_only=True)
class LayerRange(Record):
    """The largest magnitude in a layer before and after its weights were scaled, and where it is after."""

    before: float
    after: float
    where: str


@dataclass(frozen=True, kw_only=True)
class Calibration(Record):
    """What weights, scales or ranges were chosen by.

    Attributes:
        text: the calibration text's file name.
        tokens: of the text that were run.
        seed: that chose which.
        methods: what was done with it: "scaling", "gptq", "fp16 range", "kv cache".
        ranges: of every layer, where it was kept in fp16's range.
    """

    text: str
    tokens: int
    seed: int
    methods: tuple[str, ...]
    ranges: tuple[LayerRange, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Comparison(Record):
    """A measured difference and its limit; `value` None is one that is not finite, and never passes."""

    name: str
    case: str
    metric: str
    value: float | None
    limit: float
    passed: bool


@dataclass(frozen=True, kw_only=True)
class Parity(Record):
    """The gate's verdict and everything it compared."""

    evaluated_by: str
    passed: bool
    comparisons: tuple[Comparison, ...] = ()

    def report(self) -> dict[str, Any]:
        """The JSON object of the commands `verify` and `selftest`."""
        return {
            "schema": 1,
            "passed": self.passed,
            "evaluated_by": self.evaluated_by,
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }


@dataclass(frozen=True, kw_only=True)
class Quality(Record):
    """How well the bundle predicts a text, and how far it is from transformers in fp32 there.

    Attributes:
        text: the text's file name.
        tokens: of the text that were run, in windows that know nothing of each other.
        perplexity: exp of the mean −log p (nats) of each window's tokens from its second on.
        reference_perplexity: that of transformers in fp32 on the same windows.
        kl_mean, kl_p99: mean and 99th percentile of KL(transformers ‖ bundle) in nats over all positions.
        top1: the fraction of positions, 0..1, where both find the same token most likely.
    """

    text: str
    tokens: int
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_p99: float
    top1: float

    @property
    def perplexity_increase(self) -> float:
        """Of the perplexity over the reference's, in percent of that."""
        return 100 * (self.perplexity / self.reference_perplexity - 1)
