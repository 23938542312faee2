"""Greedy generation measured case after case, round after round, contenders in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from exporter.bench.rounds import in_turn
from exporter.bench.serve import Unable
from runtime.bandwidth import Bandwidth
from runtime.bundle import Bundle

STATE = "case"  # one of each contender at a time: a cache is given back before the next is taken
_WAKE_TOKENS, _WAKE_STEPS = 8, 2


@dataclass(frozen=True)
class Case:
    """So many rows at once, each of a prompt of so many tokens."""

    batch: int
    prompt_tokens: int


class Runner(Protocol):
    """Who takes part: this project in this process, a peer in its own. Tokens are greedy, whichever end a text."""

    @property
    def name(self) -> str:
        """In tables and results."""
        ...

    def awake(self) -> AbstractContextManager[None]:
        """Nothing is asked of it outside."""
        ...

    def prompt(self, state: str, file: Path, rows: int, length: int, capacity: int) -> tuple[float, list[int]]:
        """Begin `state` with prompts from a file of int32 token ids; seconds until each row's next token, and these.

        Raises:
            Unable: that is beyond the model.
        """
        ...

    def decode(self, state: str, steps: int) -> tuple[float, list[list[int]]]:
        """Go on from there; seconds of all steps, and their tokens [steps][rows]."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes of its process, `resident` now and `peak` until now, with the files that it maps."""
        ...


@dataclass
class Taken:
    """What was measured of a contender in a case.

    Attributes:
        first_token_s: seconds from the prompts to every row's first token, of each round.
        tokens_per_s: of all rows together, from their second token on, of each round.
        tokens: of each round, [rows][new tokens].
        unable: why there is none of these.
    """

    first_token_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    tokens: list[list[list[int]]] = field(default_factory=list)
    unable: str | None = None


@dataclass(frozen=True)
class Measured:
    """All of it.

    Attributes:
        taken: by contender and case, both in their order.
        peak_bytes: of each contender's process, when every case had run once.
        cold_s: seconds of the first contender's very first prompts to their first tokens.
        bandwidth: bytes per second that the machine's memory is read at; None where that was not asked for.
    """

    taken: Mapping[str, Mapping[Case, Taken]]
    peak_bytes: Mapping[str, int]
    cold_s: float
    bandwidth: float | None


class Prompts:
    """Tokens of no meaning in files, others in every round, so that nothing is found again; the same for everybody."""

    def __init__(self, bundle: Bundle, directory: Path) -> None:
        # A batch's padding is told by its token: what ends a text, or fills one up, is not among these.
        config, generation = bundle.config, bundle.generation_config
        named = (config.get("bos_token_id"), config.get("pad_token_id"), generation.get("pad_token_id"))
        special = [token for token in named if isinstance(token, int)]
        self._ids = np.setdiff1d(np.arange(bundle.vocab_size), [*special, *bundle.eos_token_ids])
        self._directory = directory

    def file(self, number: int, case: Case) -> Path:
        """Of a round and a case."""
        path = self._directory / f"prompts-{case.batch}x{case.prompt_tokens}.bin"
        random = np.random.default_rng((number, case.batch, case.prompt_tokens))
        random.choice(self._ids, (case.batch, case.prompt_tokens)).astype(np.int32).tofile(path)
        return path


def measure(
    runners: Sequence[Runner],
    cases: Sequence[Case],
    prompts: Prompts,
    *,
    new_tokens: int,
    rounds: int,
    threads: int | None = None,
    reads_memory: bool = True,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Measured:
    """Run every case with every contender, round after round; a round ahead of them is not counted.

    Args:
        runners: who takes part; in each round another begins.
        cases: batches and prompts.
        prompts: that all of them get.
        new_tokens: of each row, at least 2.
        rounds: how often each case is measured.
        threads: that read memory at once when its bandwidth is measured (default: one per core).
        reads_memory: whether a step reads the memory that can be measured here, between the cases.
        progress: called with how many of how many generations are done.
    """
    taken = {runner.name: {case: Taken() for case in cases} for runner in runners}
    peaks: dict[str, int] = {}
    cold, done, total = 0.0, 0, (rounds + 1) * len(cases) * len(runners)
    memory: Bandwidth | None = None
    for number in range(rounds + 1):
        for case in cases:
            file = prompts.file(number, case)
            for runner in in_turn(runners, number):
                turn = taken[runner.name][case] if number else Taken()
                if turn.unable is None:
                    with runner.awake():
                        if number and len(runners) > 1:
                            _wake(runner, file, case)
                        _take(runner, turn, file, case, new_tokens)
                cold = cold or sum(turn.first_token_s)
                done += 1
                progress(done, total)
            if memory is not None:
                memory.measure()
        if number == 0:
            peaks = {runner.name: runner.memory()["peak"] for runner in runners}
            memory = Bandwidth(threads) if reads_memory else None  # takes memory of its own
    return Measured(taken, peaks, cold, None if memory is None else memory.bytes_per_s)


def _wake(runner: Runner, file: Path, case: Case) -> None:
    """What comes first after a stop is slower: threads sleep, and caches hold what others read."""
    length = min(_WAKE_TOKENS, case.prompt_tokens)
    runner.prompt(STATE, file, 1, length, length + _WAKE_STEPS)
    runner.decode(STATE, _WAKE_STEPS)


def _take(runner: Runner, turn: Taken, file: Path, case: Case, new_tokens: int) -> None:
    capacity = case.prompt_tokens + new_tokens - 1  # the last token is not written
    try:
        first_s, first = runner.prompt(STATE, file, case.batch, case.prompt_tokens, capacity)
    except Unable as reason:
        turn.unable = str(reason)
        return
    decode_s, others = runner.decode(STATE, new_tokens - 1)
    turn.first_token_s.append(first_s)
    turn.tokens_per_s.append(case.batch * (new_tokens - 1) / decode_s)
    turn.tokens.append([list(row) for row in zip(first, *others, strict=True)])
