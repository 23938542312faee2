"""How fast a bundle answers here, and how fast the memory would let it: a step reads every weight once."""

from __future__ import annotations

import itertools
import resource
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.bandwidth import Bandwidth
from runtime.errors import UserError
from runtime.text_generation import TextGenerator


@dataclass(frozen=True)
class Case:
    """So many rows at once, each of a prompt of so many tokens."""

    batch: int
    prompt_tokens: int


@dataclass(frozen=True)
class Spread:
    """Of one figure over all rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        """Of at least one figure."""
        return cls(statistics.median(figures), min(figures), max(figures))


@dataclass(frozen=True)
class Speed:
    """What was measured of a case.

    Attributes:
        case: which.
        first_token_s: seconds from the prompts to every row's first token.
        tokens_per_s: of all rows together, from their second token on.
        step_bytes: that a decoding step reads: the weights, and the cache as long as it is half way through.
        roofline: tokens per second if reading them at the bandwidth measured were all there is to do; None where
            the memory that is read was not measured, or the bundle does not tell its weights.
    """

    case: Case
    first_token_s: Spread
    tokens_per_s: Spread
    step_bytes: int | None
    roofline: float | None

    @property
    def share(self) -> float | None:
        """The fraction of the roofline that is reached, 0..1."""
        return self.roofline and self.tokens_per_s.median / self.roofline

    def to_json(self) -> dict[str, Any]:
        """One of the `speeds` of the command `bench`."""
        return {
            **vars(self.case),
            "first_token_s": vars(self.first_token_s),
            "tokens_per_s": vars(self.tokens_per_s),
            "step_bytes": self.step_bytes,
            "roofline_tokens_per_s": self.roofline,
            "roofline_share": self.share,
        }


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        speeds: of every case.
        bandwidth: bytes per second that the machine's memory is read at; None where the model runs on a GPU.
        cold_s: seconds of the very first generation to its first tokens.
        peak_bytes: of the process, resident, when every case had run once.
    """

    speeds: tuple[Speed, ...]
    bandwidth: float | None
    cold_s: float
    peak_bytes: int


def bench(
    model: TextGenerator,
    cases: Sequence[Case],
    *,
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Report:
    """Measure greedy generation, case after case, round after round; a round ahead of them is not counted.

    Args:
        model: what is measured.
        cases: batches and prompts.
        new_tokens: of each row, at least 2.
        rounds: how often each case is measured.
        threads: that read memory at once when its bandwidth is measured (default: one per core).
        progress: called with how many of how many generations are done.

    Raises:
        UserError: rows of a case pass what the model holds.
    """
    for case in cases:
        if case.prompt_tokens + new_tokens > model.max_length:
            raise UserError(
                f"a prompt of {case.prompt_tokens} tokens and {new_tokens} new ones pass the {model.max_length} that "
                f"{model.bundle.path} has on {model.backend}; take fewer"
            )
    memory: Bandwidth | None = None
    first: dict[Case, list[float]] = {case: [] for case in cases}
    rates: dict[Case, list[float]] = {case: [] for case in cases}
    total, cold, peak = (rounds + 1) * len(cases), 0.0, 0
    for done, (number, case) in enumerate(itertools.product(range(rounds + 1), cases), start=1):
        timing = model.generate(
            _prompts(model, case, seed=done), max_new_tokens=new_tokens, greedy=True, ignore_eos=True
        ).timing
        cold = cold or timing.ttft_s
        if done == len(cases):  # what measures the bandwidth takes memory of its own
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            memory = Bandwidth(threads) if model.backend == "onnxruntime-cpu" else None
        if memory is not None:
            memory.measure()
        if number:
            assert timing.decode_tokens_per_s is not None
            first[case].append(timing.ttft_s)
            rates[case].append(timing.decode_tokens_per_s)
        progress(done, total)
    bandwidth = None if memory is None else memory.bytes_per_s
    speeds = []
    for case in cases:
        read = _step_bytes(model, case, new_tokens)
        roofline = case.batch * bandwidth / read if bandwidth and read else None
        speeds.append(Speed(case, Spread.of(first[case]), Spread.of(rates[case]), read, roofline))
    return Report(tuple(speeds), bandwidth, cold, peak)


def _prompts(model: TextGenerator, case: Case, seed: int) -> list[list[int]]:
    """Tokens of no meaning; others each time, so that nothing is found again."""
    random = np.random.default_rng(seed)
    return [
        [int(token) for token in random.integers(0, model.bundle.vocab_size, case.prompt_tokens)]
        for _ in range(case.batch)
    ]


def _step_bytes(model: TextGenerator, case: Case, new_tokens: int) -> int | None:
    weights = model.bundle.manifest.step_bytes
    if weights is None:
        return None
    cached = model.bundle.cache_geometry.bytes_per_token if model.bundle.has_cache else 0
    return weights + case.batch * cached * (case.prompt_tokens + new_tokens // 2)
