"""What contenders of `benchmarks.compare` do in their turns, and what is written down of it."""

from __future__ import annotations

import signal
import sys
import time
from collections import defaultdict
from collections.abc import Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.child import ROOT
from benchmarks.make_checkpoint import TINY
from benchmarks.reach import Figure
from exporter.bench.process import Contender, Running
from exporter.bench.rounds import in_turn

UNJUDGED = 1  # rounds of contenders that no figure is about


@dataclass(frozen=True)
class Workload:
    """Rows, the tokens of their prompts, and steps of a turn."""

    rows: int
    prompt: int
    steps: int

    def capacity(self, turns: int = 1) -> int:
        """Tokens of a row that are in the cache after some turns."""
        return self.prompt + turns * self.steps


DECODE = Workload(1, 512, 64)
BATCH = Workload(8, 512, 32)
AGREE = Workload(2, 128, 32)  # each by itself
WARM = Workload(1, 32, 8)
IN_BATCH = {"int4", "int4 compact", "Q4_0"}
FAR_ON = {"nemotron-export int4", "nemotron-export int4 compact", "llama.cpp Q4_0"}
_FULL = 4096


def step_bytes(contender: Contender, rows: int, context: int) -> int:
    """Of a contender all of which are known: they are computed where it is set up, or its driver tells them."""
    size = contender.step_bytes(rows, context)
    assert size is not None
    return size


@dataclass
class Found:
    """What a contender did: numbers by measure, one of every turn or one alone, and its greedy tokens.

    `disk_bytes` are those of the files that it loads, `works` those of `going_on`.
    """

    contender: Contender
    disk_bytes: int
    works: dict[str, Workload] = field(default_factory=dict)
    numbers: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[list[int]] = field(default_factory=list)


def going_on(contender: Contender, rounds: int, wanted: Container[str] = ("batch", "long")) -> dict[str, Workload]:
    """Workloads whose prompts are written once, so that every turn goes on from the last: one before all rounds too."""
    works = {}
    if contender.precision in IN_BATCH and "batch" in wanted:
        works["batch"] = BATCH
    if contender.name in FAR_ON and "long" in wanted:
        works["long"] = Workload(1, _FULL - 32 * (rounds + 1), 32)
    return works


def measure(
    contenders: Sequence[tuple[Contender, int]], rounds: int, figures: Sequence[Figure], scratch: Path
) -> list[Found]:
    """Start all, let each do once what figures are about, then in turn; those that none is in UNJUDGED rounds alone.

    Contenders come with the bytes of the files that they load.
    """
    prompts = Prompts(scratch)
    judged = {name for figure in figures for name in (*figure.ours, figure.theirs)}
    wanted = {figure.measure for figure in figures}
    found = [Found(contender, disk, going_on(contender, rounds, wanted)) for contender, disk in contenders]
    with ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or stopped processes stay
        stack.callback(signal.signal, signal.SIGTERM, before)
        running = []
        for one in found:
            started = time.perf_counter()
            running.append(Running(one.contender, scratch / f"{one.contender.name}.log", ROOT))
            stack.callback(running[-1].close)
            one.contender = running[-1].contender
            one.numbers["start"].append(time.perf_counter() - started)
            with running[-1].awake():
                _first(running[-1], one, prompts, rounds)
            print(f"{one.contender.name} is ready", file=sys.stderr, flush=True)
        turns = list(zip(running, found, strict=True))
        for number in range(rounds):
            for process, one in in_turn(turns, number):
                if number < UNJUDGED or one.contender.name in judged:
                    with process.awake():
                        _turn(process, one, prompts)
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def _first(process: Running, one: Found, prompts: Prompts, rounds: int) -> None:
    """What is measured once, memory before there is anything else in it; and the prompts that turns go on from."""
    one.tokens.append(_continued(process, prompts, DECODE, 0))
    for name, size in process.memory().items():
        one.numbers[name].append(size)
    one.numbers["disk"].append(one.disk_bytes)
    one.numbers["step_bytes"].append(step_bytes(one.contender, 1, DECODE.prompt))
    one.tokens.extend(_continued(process, prompts, AGREE, row) for row in range(AGREE.rows))
    for name, work in one.works.items():
        process.prompt(name, prompts.file(work), work.rows, work.prompt, work.capacity(rounds + 1))
        process.decode(name, work.steps)


def _continued(process: Running, prompts: Prompts, work: Workload, row: int) -> list[int]:
    """The greedy tokens after a prompt by itself."""
    _, first = process.prompt("decode", prompts.file(work, row), 1, work.prompt, work.capacity())
    return first + [tokens[0] for tokens in process.decode("decode", work.steps)[1]]


def _turn(process: Running, one: Found, prompts: Prompts) -> None:
    """A contender's part of a round; what comes first wakes its threads up."""
    process.prompt("warm", prompts.file(WARM), 1, WARM.prompt, WARM.capacity())
    process.decode("warm", WARM.steps)
    seconds, _ = process.prompt("decode", prompts.file(DECODE), 1, DECODE.prompt, DECODE.capacity())
    one.numbers["first_token"].append(seconds)
    for name, work in {"decode": DECODE, **one.works}.items():
        seconds, _ = process.decode(name, work.steps)
        one.numbers[name].append(work.rows * work.steps / seconds)


class Prompts:
    """Prompts of real text, as files of int32 token ids."""

    def __init__(self, scratch: Path) -> None:
        from tokenizers import Tokenizer

        text = (TINY / "calibration.txt").read_text(encoding="utf-8")
        self._ids = np.array(Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids, np.int32)
        self._scratch = scratch

    def file(self, work: Workload, first: int = 0) -> Path:
        """The prompts of a workload, from one of them on; the first ones of all lengths begin alike."""
        path = self._scratch / f"{work.rows}x{work.prompt}-{first}.bin"
        self._ids[first * work.prompt : work.rows * work.prompt].tofile(path)
        return path
