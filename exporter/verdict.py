"""What the gate makes of the steps that it ran: comparisons of logits, of greedy choices, and golden cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from exporter.reference import Forward
from exporter.verify_rows import GateResult
from exporter.verify_steps import Step
from exporter.yardstick import Array, Expected, Ledger, compare
from runtime.golden import Golden, GoldenStep
from runtime.measured import NO_LIMIT, Comparison, Parity
from runtime.session import Ints

NEAR_TIE = 1e-3  # a greedy token may differ where the reference's two best logits are closer than this
GOLDEN_DECODE_STEPS = 4


def note_logits(ledger: Ledger, steps: Sequence[Step], expected: Sequence[Expected]) -> None:
    """Note every step's logits; `expected` is of the slots' rows."""
    for step in steps:
        for row, slot in enumerate(step.slots):
            ledger.add("logits", step.case, step.logits[row], expected[slot], _logits_at(step.positions[row]))


class Verdict:
    """The comparisons of a run.

    In 16 bit, golden cases get the limit of the logits: twice the largest |Δ| that transformers itself shows at that
    precision. The same steps on a device that rounds as often differ by no more.

    Attributes:
        golden: the reference's own logits for the prefill, the chunk and the first single tokens.
        comparisons: everything that was compared.
    """

    def __init__(
        self, steps: Sequence[Step], expected: Sequence[Expected], ledger: Ledger, found: Sequence[Comparison]
    ) -> None:
        """Compare.

        Args:
            steps: what the bundle gave.
            expected: what the rows of their slots are.
            ledger: with everything noted.
            found: comparisons that come first.
        """
        limits = ledger.comparisons()
        self.comparisons = [*found, *limits, *_compare_greedy(steps, expected, ledger.precision)]
        limit = max(found.limit for found in limits if (found.name, found.metric) == ("logits", "max_abs"))
        self.golden = _golden(steps, expected, limit)

    def allow(self, golden: Golden, measured: Comparison) -> None:
        """Take golden cases of a wider limit, and what it comes from."""
        self.golden = golden
        self.comparisons.append(measured)

    def result(self, evaluated_by: str) -> GateResult:
        """As the gate gives it."""
        passed = all(comparison.passed for comparison in self.comparisons)
        return GateResult(
            Parity(evaluated_by=evaluated_by, passed=passed, comparisons=tuple(self.comparisons)), self.golden
        )


def golden_steps(steps: Sequence[Step]) -> list[Step]:
    """Those that are recorded: all but the later ones of single tokens."""
    decode = [step for step in steps if step.case == "decode"][:GOLDEN_DECODE_STEPS]
    return [step for step in steps if step.case != "decode"] + decode


def exact_logits(step: Step, expected: Sequence[Expected]) -> list[Array]:
    """The reference's logits of each row of a step, [keep, vocab]."""
    return [expected[slot].exact.logits[at] for slot, at in zip(step.slots, step.positions, strict=True)]


def _compare_greedy(steps: Sequence[Step], expected: Sequence[Expected], precision: str) -> list[Comparison]:
    """In fp32 greedy choices equal the reference's unless its two best logits nearly tie; in 16 bit it counts."""
    wrong = ties = 0
    for step in steps:
        for ours, exact in zip(step.logits, exact_logits(step, expected), strict=True):
            best = np.partition(exact, -2, axis=-1) if exact.shape[-1] > 1 else np.repeat(exact, 2, -1)
            tied = best[:, -1] - best[:, -2] < NEAR_TIE
            differs = ours.argmax(-1) != exact.argmax(-1)
            ties += int((differs & tied).sum())
            wrong += int((differs & ~tied).sum())
    found = [("different_tokens", wrong, 0.0 if precision == "fp32" else NO_LIMIT)]
    found += [("near_ties_excused", ties, NO_LIMIT)] if ties else []
    return [compare("greedy", "all", metric, float(value), limit) for metric, value, limit in found]


def _golden(steps: Sequence[Step], expected: Sequence[Expected], limit: float) -> Golden:
    kept = golden_steps(steps)
    recorded = [
        GoldenStep.record(
            step.case,
            tokens=step.tokens,
            lengths=step.lengths,
            past_lengths=step.past,
            slots=step.slots,
            logits=np.stack(exact_logits(step, expected)).astype(np.float32),
        )
        for step in kept
    ]
    capacity = max(int(step.past.max()) + step.tokens.shape[1] for step in kept)  # padding of one row beside another
    return Golden(slots=len(expected), capacity=capacity, limit=limit, steps=recorded)


def _logits_at(positions: Ints) -> Callable[[Forward], Array]:
    return lambda forward: forward.logits[positions]
