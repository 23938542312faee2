"""Our speed and memory beside transformers', onnxruntime-genai's, llama.cpp's and OpenVINO's, on one random checkpoint.

    python -m benchmarks.compare [--preset 242m|minitron-4b] [--rounds N] [--peers NAME ...] [--directory DIR]
                                 [--results FILE] [--plot FILE]

Peers are set up where they are not there yet: each in an environment of its own in DIR, llama.cpp built for this
machine, the checkpoint converted by each peer's own program. Contenders are processes that stay, stopped but for their turns. A
round is a turn of each: a new prompt of 512 tokens, of which the seconds to the first token count, 64 tokens after it,
then 32 steps of a batch of 8 and 32 far on in a row of 4096, where it has these. Every core takes part.

Bytes of a step are those of its weights, which it must read, and of its cache; the roofline is how fast it were if this
took all its time, by the read bandwidth of the same run. `first` tokens are compared with transformers in fp32. Ratios
are of one round, see `benchmarks.reach`. Exit code 1 where a figure is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bandwidth import read_bandwidth
from benchmarks.child import ROOT, measured
from benchmarks.compare_report import draw, row_of, table
from benchmarks.contenders import genai, llama, ours, transformers
from benchmarks.contenders.base import Contender, Running, made
from benchmarks.make_checkpoint import TINY
from benchmarks.peers import write_sentencepiece
from benchmarks.reach import FIGURES, judge, leading
from exporter.cli._plot import check_plot
from runtime.errors import UserError
from runtime.hardware import cpu_name

DIRECTORY = ROOT / "build" / "compare"
REFERENCE = f"{transformers.PEER} fp32"


@dataclass(frozen=True)
class Workload:
    """Rows, the tokens of their prompts, and steps of a round."""

    rows: int
    prompt: int
    steps: int


DECODE = Workload(1, 512, 64)
BATCH = Workload(8, 512, 32)
LONG = Workload(1, 3840, 32)
AGREE = Workload(3, 128, 32)  # each by itself
WARM = Workload(1, 32, 8)
# What a preset's contenders are, and which of them go on in a batch and far on in a row.
PEERS: dict[str, dict[str, tuple[str, ...]]] = {
    "242m": {
        ours.PEER: ("fp32", "int8", "int4"),
        llama.PEER: ("F32", "BF16", "Q8_0", "Q4_0"),
        genai.PEER: ("fp32", "int8", "int4"),
        transformers.PEER: ("fp32", "bf16"),
    },
    "minitron-4b": {ours.PEER: ("int4",), llama.PEER: ("Q4_0",)},
}
IN_BATCH = {"int4", "Q4_0"}
FAR_ON = {f"{ours.PEER} int4", f"{llama.PEER} Q4_0"}


@dataclass
class Found:
    """What a contender did: numbers by measure, one of every round or one alone, and its greedy tokens."""

    contender: Contender
    numbers: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: list[list[int]] = field(default_factory=list)


def set_up(preset: str, peers: Sequence[str], place: Path) -> Iterator[Contender]:
    """The contenders of a preset, by bits, so that those that are compared follow each other."""
    directory = place / preset
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = made(directory / "checkpoint", lambda output: _checkpoint(output, preset))
    wanted = {peer: names for peer, names in PEERS[preset].items() if peer in peers}
    if ours.PEER in wanted:
        yield from ours.contenders(checkpoint, directory, wanted[ours.PEER])
    if llama.PEER in wanted:
        yield from llama.contenders(checkpoint, directory, place, wanted[llama.PEER])
    if genai.PEER in wanted:
        yield from genai.contenders(checkpoint, directory, place, wanted[genai.PEER])
    if transformers.PEER in wanted:
        yield from transformers.contenders(checkpoint, wanted[transformers.PEER])


def _checkpoint(output: Path, preset: str) -> None:
    measured([sys.executable, "-m", "benchmarks.make_checkpoint", "--preset", preset, output])
    write_sentencepiece(output)  # which llama.cpp's converter asks for


def measure(contenders: Sequence[Contender], rounds: int, scratch: Path) -> list[Found]:
    """Start all, run each once for its memory, its tokens and its warmth, then in turn."""
    prompts = Prompts(scratch)
    capacity = {name: work.prompt + (rounds + 1) * work.steps + 1 for name, work in (("batch", BATCH), ("long", LONG))}
    found = [Found(contender) for contender in contenders]
    with ExitStack() as stack:
        running = []
        for one in found:
            started = time.perf_counter()
            process = Running(one.contender, scratch / f"{one.contender.name}.log")
            stack.callback(process.close)
            one.numbers["start"].append(time.perf_counter() - started)
            running.append(process)
            with process.awake():
                _first(process, one, prompts, capacity)
            print(f"{one.contender.name}: ready", file=sys.stderr, flush=True)
        turns = list(zip(running, found, strict=True))
        for number in range(rounds):
            for process, one in turns[:: -1 if number % 2 else 1]:
                with process.awake():
                    _turn(process, one, prompts)
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def _first(process: Running, one: Found, prompts: Prompts, capacity: dict[str, int]) -> None:
    """What is measured once, memory before there is anything else in it; and the prompts that rounds go on from."""
    one.tokens.append(_continued(process, prompts, DECODE, 0))
    for measure_, size in process.memory().items():
        one.numbers[measure_].append(size)
    one.numbers["disk"].append(one.contender.disk_bytes)
    one.numbers["step_bytes"].append(one.contender.step_bytes(1, DECODE.prompt))
    one.tokens.extend(_continued(process, prompts, AGREE, row) for row in range(AGREE.rows))
    for name, work in _others(one.contender):
        process.prompt(name, prompts.file(work), work.rows, work.prompt, capacity[name])
        process.decode(name, work.steps)


def _continued(process: Running, prompts: Prompts, work: Workload, row: int) -> list[int]:
    """The greedy tokens after a prompt by itself."""
    _, first = process.prompt("decode", prompts.file(work, row), 1, work.prompt, work.prompt + work.steps + 1)
    return first + [tokens[0] for tokens in process.decode("decode", work.steps)[1]]


def _turn(process: Running, one: Found, prompts: Prompts) -> None:
    """A contender's part of a round; what comes first wakes its threads up."""
    process.prompt("warm", prompts.file(WARM), 1, WARM.prompt, WARM.prompt + WARM.steps + 1)
    process.decode("warm", WARM.steps)
    seconds, _ = process.prompt("decode", prompts.file(DECODE), 1, DECODE.prompt, DECODE.prompt + DECODE.steps + 1)
    one.numbers["first_token"].append(seconds)
    for name, work in (("decode", DECODE), *_others(one.contender)):
        seconds, _ = process.decode(name, work.steps)
        one.numbers[name].append(work.rows * work.steps / seconds)


def _others(contender: Contender) -> Iterator[tuple[str, Workload]]:
    if contender.precision in IN_BATCH:
        yield "batch", BATCH
    if contender.name in FAR_ON:
        yield "long", LONG


class Prompts:
    """Prompts of real text, as files of int32 token ids."""

    def __init__(self, scratch: Path) -> None:
        from tokenizers import Tokenizer

        text = (TINY / "calibration.txt").read_text(encoding="utf-8")
        self._ids = np.array(Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(text).ids, np.int32)
        self._scratch = scratch

    def file(self, work: Workload, first: int = 0) -> Path:
        """A file with the prompts of a workload, from one of them on; prompts of different lengths begin alike."""
        path = self._scratch / f"{work.rows}x{work.prompt}-{first}.bin"
        if not path.exists():
            self._ids[first * work.prompt : work.rows * work.prompt].tofile(path)
        return path


def report_of(preset: str, rounds: int, found: Sequence[Found], bandwidth: float) -> dict[str, Any]:
    """The JSON of a comparison."""
    samples = {one.contender.name: one.numbers for one in found}
    tokens = {one.contender.name: one.tokens for one in found}
    expected = tokens.get(REFERENCE)
    contenders = {}
    for one in found:
        works = {"decode": DECODE, **dict(_others(one.contender))}
        # In the middle of what rounds decode: a row that goes on is longer in each.
        context = {
            name: work.prompt + work.steps * ((rounds + 1) // 2 if name != "decode" else 1) // 2
            for name, work in works.items()
        }
        steps = {name: (work.rows, one.contender.step_bytes(work.rows, context[name])) for name, work in works.items()}
        agreement = None
        if expected is not None:
            agreement = statistics.mean(leading(*pair) for pair in zip(one.tokens, expected, strict=True))
        contenders[one.contender.name] = row_of(one.numbers, bandwidth, steps) | {
            "agreement": agreement if agreement is None else round(agreement, 4),
            "weight_bytes": one.contender.weight_bytes,
            "cache_bytes_per_token": one.contender.cache_bytes,
            "versions": one.contender.versions,
        }
    cores = len(os.sched_getaffinity(0))
    return {
        "schema": 1,
        "preset": preset,
        "rounds": rounds,
        "machine": {
            "cpu": cpu_name(),
            "cores": cores,
            "read_gb_s": round(bandwidth / 1e9, 2),
            "system": platform.platform(),
        },
        "not_run": {},
        "contenders": contenders,
        "figures": [judge(figure, samples).to_json() for figure in FIGURES[preset]],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up, measure, print and write; exit code 1 where a figure is missed, 2 where a plot cannot be drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PEERS, default="242m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="+", choices=PEERS["242m"], default=list(PEERS["242m"]))
    parser.add_argument("--directory", type=Path, default=DIRECTORY, help="where peers and models stay")
    parser.add_argument("--results", type=Path, help="of JSON; benchmarks/results/compare-PRESET.json by default")
    parser.add_argument("--plot", type=Path, help="a picture; beside the JSON by default")
    given = parser.parse_args(arguments)
    results = given.results or ROOT / "benchmarks" / "results" / f"compare-{given.preset}.json"
    plot = given.plot or results.with_suffix(".svg")
    try:
        check_plot(plot)
    except UserError as error:
        parser.error(str(error))
    contenders = list(set_up(given.preset, given.peers, given.directory.absolute()))
    scratch = given.directory.absolute() / given.preset
    before = read_bandwidth()
    found = measure(contenders, given.rounds, scratch)
    report = report_of(given.preset, given.rounds, found, max(before, read_bandwidth()))
    results.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, plot)
    print(table(report))
    return int(any(figure["met"] is False for figure in report["figures"]))


if __name__ == "__main__":
    sys.exit(main())
