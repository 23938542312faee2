"""From logits to the next token: transformers' processors in transformers' order, in numpy.

Repetition penalty, then temperature, top-k, top-p, min-p, then one draw. Each row draws from a generator of
its own: what it says does not depend on who shares its batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from runtime.errors import CheckFailed, UserError
from runtime.session import Floats, Ints

COLDEST = 1e-5
_GROUPS = 8  # for each score that is looked for: then hardly two of them share one
_BLOCK = 512
_NUCLEI = (512, 8192)  # how many tokens are tried for the mass of top-p before all are


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and ignores the rest but the penalty, and so
            does anything below COLDEST, where the quotients leave float32.
        top_k: only the k most likely tokens (and ties with the last); 0 for all.
        top_p: only the most likely tokens whose probabilities reach this sum; 1 for all.
        min_p: only tokens at least this fraction as likely as the most likely; 0 for all.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen before; 1 for none.
        seed: of the draws; None for a different text each time.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < np.inf, "temperature", self.temperature, "0 (greedy) or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (all tokens) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (all tokens)")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (all tokens) to 1")
        penalty = self.repetition_penalty
        _require(0 < penalty < np.inf, "repetition_penalty", penalty, "above 0 (1 is none)")
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")

    @classmethod
    def from_config(
        cls,
        generation_config: Mapping[str, Any],
        *,
        greedy: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Self:
        """The caller's wishes over the checkpoint's generation_config.json over transformers' defaults.

        Asking for a temperature, top_k, top_p or min_p asks for sampling, also where the checkpoint's default
        is greedy; `greedy` asks for none.
        """
        config = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
        config |= {name: value for name in config if (value := generation_config.get(name)) is not None}
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        asked = {name: value for name, value in given.items() if value is not None}
        sample = bool(asked or generation_config.get("do_sample"))
        chosen = config | asked
        if greedy or not sample:
            chosen["temperature"] = 0.0
        if repetition_penalty is not None:
            chosen["repetition_penalty"] = repetition_penalty
        return cls(
            temperature=float(chosen["temperature"]),
            top_k=int(chosen["top_k"]),
            top_p=float(chosen["top_p"]),
            min_p=float(chosen["min_p"]),
            repetition_penalty=float(chosen["repetition_penalty"]),
            seed=seed,
        )


class Sampler:
    """Chooses the tokens of one row."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        self._seen = np.unique(np.asarray(prompt, np.int64))
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: Floats) -> int:
        """The next token, given float32 logits [vocab] after everything so far.

        Raises:
            CheckFailed: the logits are not numbers.
        """
        if not np.isfinite(logits.max()):
            raise CheckFailed(
                "the model produced logits that are not finite; run nemotron-export selftest on the bundle"
            )
        token = self._draw(logits)
        if self._sampling.repetition_penalty != 1 and token not in self._seen:
            self._seen = np.append(self._seen, token)
        return token

    def _draw(self, logits: Floats) -> int:
        scores = penalise(logits, self._seen, self._sampling.repetition_penalty)
        if self._sampling.temperature < COLDEST:
            return int(scores.argmax())
        tokens, scores = candidates(scores, self._sampling)
        return int(tokens[_drawn(_powers(scores), self._random.random())])


def penalise(logits: Floats, seen: Ints, penalty: float) -> Floats:
    """Logits [vocab] with tokens seen before made less likely (https://arxiv.org/abs/1909.05858, 4.1)."""
    if penalty == 1:
        return logits
    scores = logits.copy()
    scores[seen] = np.where(scores[seen] < 0, scores[seen] * penalty, scores[seen] / penalty)
    return scores


def candidates(logits: Floats, sampling: Sampling) -> tuple[Ints, Floats]:
    """The tokens that may be drawn, with float32 scores: over temperature, cut by top-k, top-p, min-p."""
    scores = logits / np.float32(sampling.temperature)
    tokens: Ints | None = None
    for keeps, cut, none in ((_top_k, sampling.top_k, 0), (_top_p, sampling.top_p, 1), (_min_p, sampling.min_p, 0)):
        if cut != none:
            kept = keeps(scores, cut)
            tokens, scores = kept if tokens is None else tokens[kept], scores[kept]
    return np.arange(len(scores)) if tokens is None else tokens, scores


def _top_k(scores: Floats, count: float) -> Ints:
    """Places of the `count` largest scores, and of what ties with the least of them, in order."""
    near = _leading(scores, min(int(count), len(scores)))
    among = scores[near]
    least = max(len(among) - int(count), 0)
    places: Ints = near[among >= np.partition(among, least)[least]]
    return places


def _top_p(scores: Floats, mass: float) -> Ints:
    """Places of the largest scores whose probabilities reach `mass`, in order; of equal ones the last are taken first.

    transformers sorts all of them; what is sorted here are the largest few, unless more hold that mass.
    """
    powers = _powers(scores)
    total = powers.sum(dtype=np.float64)
    for count in (*_NUCLEI, len(scores)):
        near = _leading(scores, count)
        among = powers[near].sum(dtype=np.float64)
        if among >= mass * total or len(near) == len(scores):
            break
    ordered = np.sort(scores[near])
    below = total - among + np.cumsum(_powers(ordered).astype(np.float64))  # what each and all below it hold
    first = min(int(np.searchsorted(below, (1 - mass) * total, side="right")), len(ordered) - 1)
    kept = near[scores[near] >= ordered[first]]
    tied = np.flatnonzero(scores[kept] == ordered[first])
    return np.delete(kept, tied[: len(kept) - (len(ordered) - first)])


def _min_p(scores: Floats, fraction: float) -> Ints:
    """Places of what is at least this fraction as likely as the most likely, in order."""
    return np.flatnonzero(_powers(scores) >= np.float32(fraction))


def _leading(scores: Floats, count: int) -> Ints:
    """Places, in order, of at least the `count` largest scores, and, unless there are few scores, of not many more.

    Of many groups the `count`th largest maximum is reached by `count` scores or more: one pass in place of a sort.
    """
    groups = _GROUPS * count
    if groups > len(scores) // 2:
        return np.arange(len(scores))
    whole = len(scores) // groups * groups
    maxima = scores[:whole].reshape(-1, groups).max(axis=0)
    return np.flatnonzero(scores >= np.partition(maxima, -count)[-count])


def _drawn(powers: Floats, share: float) -> int:
    """The place at which this share, below 1, of all mass is passed; looked for in blocks, then within one."""
    starts = np.arange(0, len(powers), _BLOCK)
    masses = np.cumsum(np.add.reduceat(powers, starts, dtype=np.float64))
    wanted = min(share * masses[-1], np.nextafter(masses[-1], 0))
    block = int(np.searchsorted(masses, wanted, side="right"))
    ahead = masses[block - 1] if block else 0.0
    within = ahead + np.cumsum(powers[starts[block] : starts[block] + _BLOCK], dtype=np.float64)
    within[-1] = masses[block]  # the sum in another order may fall short of it
    return int(starts[block] + np.searchsorted(within, wanted, side="right"))


def _powers(scores: Floats) -> Floats:
    """Probabilities over the largest of them."""
    powers: Floats = np.exp(scores - scores.max())
    return powers


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} should be {allowed}; found {value}")
