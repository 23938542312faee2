"""What a diagnosis found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exporter.diagnose.cause import Proof
from exporter.diagnose.difference import Difference, finite

EMBEDDING, FINAL_NORM, LOGITS = "embedding", "final norm", "logits"


@dataclass(frozen=True)
class Finding:
    """A part of the model that is wrong by itself: it differs from transformers on the same input.

    Attributes:
        place: `layer 3`, `embedding`, `final norm` or `logits`.
        layer: its index, of a layer.
        tap: the first value within it that differs.
        difference: of that value.
        taps: of all values, in the order in which they are computed.
        proof: the cause; None where no hypothesis agrees.
    """

    place: str
    layer: int | None
    tap: str
    difference: Difference
    taps: Mapping[str, Difference]
    proof: Proof | None

    def told(self) -> str:
        """One line."""
        cause = self.proof.text if self.proof else "no known cause explains it"
        where = self.place if self.tap == self.place else f"{self.place}, {self.tap}"
        return f"{where}: {cause}"

    def to_json(self) -> dict[str, Any]:
        """One of the `findings` of the command's JSON object."""
        proof = self.proof
        return {
            "place": self.place,
            "layer": self.layer,
            "tap": self.tap,
            "cause": proof and proof.cause,
            "text": self.told(),
            "error_in_limits": proof and {"without": finite(proof.before), "with": finite(proof.after)},
            "difference": self.difference.to_json(),
            "taps": {tap: found.to_json() for tap, found in self.taps.items()},
        }


@dataclass(frozen=True)
class Stage:
    """A part of the model, side by side with transformers' from the tokens on, and on the bundle's own input.

    Attributes:
        name: as `Finding.place`.
        difference: of what it gives, as differences have added up.
        alone: of what it gives for the bundle's own input; None where that is not finite.
    """

    name: str
    difference: Difference
    alone: Difference | None

    def to_json(self) -> dict[str, Any]:
        """One of the `stages` of the command's JSON object."""
        return {
            "name": self.name,
            "difference": self.difference.to_json(),
            "alone": self.alone and self.alone.to_json(),
        }


@dataclass(frozen=True)
class Report:
    """A diagnosis.

    Attributes:
        evaluated_by: what ran the bundle, and its version.
        tokens: the row, as ids.
        stages: in order.
        findings: in order; the first is where bundle and transformers part.
    """

    evaluated_by: str
    tokens: Sequence[int]
    stages: Sequence[Stage] = field(default_factory=list)
    findings: Sequence[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """The command's JSON object."""
        return {
            "schema": 1,
            "passed": self.passed,
            "evaluated_by": self.evaluated_by,
            "tokens": list(self.tokens),
            "stages": [stage.to_json() for stage in self.stages],
            "findings": [finding.to_json() for finding in self.findings],
        }
