"""The vocabulary's product, a run of tokens at a time: logits are compared, and none is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from exporter.diagnose.cause import WEIGHT, Proof
from exporter.diagnose.difference import Difference, limit_of
from exporter.diagnose.report import LOGITS, Finding, Stage
from exporter.diagnose.theirs import TransformersRun
from exporter.layered_reference import Weights
from exporter.parameters import EMBEDDING, HEAD

Tensor = torch.Tensor

SHOWN = 5  # tokens whose rows are named


@dataclass
class _Sums:
    """What a comparison of logits adds up to over runs of the vocabulary."""

    apart: Tensor  # [tokens], the largest differences
    size: float = 0.0
    dot: float = 0.0
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def note(self, ours: Tensor, exact: Tensor) -> None:
        """Take in a run."""
        apart = (ours - exact).abs()
        self.apart = torch.maximum(self.apart, torch.where(apart.isfinite(), apart, torch.inf).amax(1))
        self.size = max(self.size, float(exact.abs().nan_to_num(posinf=0.0).max()))
        self.dot += float((ours * exact).sum())
        self.squares = [self.squares[0] + float(ours.square().sum()), self.squares[1] + float(exact.square().sum())]

    def difference(self, limit: float | None) -> Difference:
        """Of all of it."""
        most, norm = float(self.apart.max()), (self.squares[0] * self.squares[1]) ** 0.5
        size = max(self.size, torch.finfo(torch.float32).tiny)
        relative = (self.apart / size).tolist()
        return Difference(most, max(relative), self.dot / norm if norm else 0.0, size, limit, tuple(relative))


def judge_logits(
    runs: Iterator[tuple[slice, Tensor]],
    normed: Tensor,
    theirs: TransformersRun,
    alone: tuple[TransformersRun, TransformersRun],
    weights: Weights,
    precision: str,
) -> tuple[Stage, Finding | None]:
    """Compare logits with transformers' from the tokens on, and with its head's on the bundle's own final norm.

    Args:
        runs: of the vocabulary, and the bundle's logits [tokens, n].
        normed: what the bundle's head reads, float64 [tokens, hidden].
        theirs: transformers, which has run all layers.
        alone: transformers in fp32 and as the yardstick.
        weights: the model's.
        precision: of the bundle's activations.
    """
    given = theirs.final_norm()
    nothing = torch.zeros(len(normed), dtype=torch.float64)
    whole, own, tied = (_Sums(nothing.clone()) for _ in range(3))
    limit, wrong = 0.0, list[int]()
    exact_run, yardstick = alone
    for part, logits in runs:
        matrix = weights.read(HEAD, part)
        whole.note(logits, theirs.logits(given, matrix))
        exact = exact_run.logits(normed, matrix)
        own.note(logits, exact)
        tied.note(logits, exact_run.logits(normed, weights.read(EMBEDDING, part)))
        limit = max(limit, limit_of(exact, yardstick.logits(normed, matrix), precision))
        wrong += [part.start + int(row) for row in (~((logits - exact).abs() <= limit)).any(0).nonzero()]
    found = _judged(own, normed, limit)
    stage = Stage(LOGITS, whole.difference(None), found)
    if found is None or found.passed:
        return stage, None
    ratio = float(tied.apart.max()) / limit
    proof = None
    if ratio <= 1:
        proof = Proof(WEIGHT, "the head multiplies with the embedding's matrix", found.max_abs / limit, ratio)
    elif len(wrong) <= SHOWN:
        text = f"rows of lm_head.weight are wrong: those of the tokens {wrong}, and no others"
        proof = Proof(WEIGHT, text, found.max_abs / limit, 0.0)
    return stage, Finding(LOGITS, None, LOGITS, found, {LOGITS: found}, proof)


def _judged(sums: _Sums, normed: Tensor, limit: float) -> Difference | None:
    """What is judged, where the bundle's own input is finite."""
    return sums.difference(limit) if bool(normed.isfinite().all()) else None
