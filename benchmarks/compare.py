"""Our speed and memory beside transformers', onnxruntime-genai's, llama.cpp's and OpenVINO's, on one random checkpoint.

    python -m benchmarks.compare [--preset 242m|minitron-4b] [--rounds N] [--peers NAME ...] [--directory DIR]
                                 [--results FILE] [--plot FILE]

Peers are set up where they are not there yet: each in an environment of its own in DIR, llama.cpp built for this
machine, the checkpoint converted by each peer's own program. Contenders are processes that stay, stopped but for their
turns. A round is a turn of each: a new prompt of 512 tokens, of which the seconds to the first token count, 64 tokens
after it, then 32 steps of a batch of 8 and 32 far on in a row of 4096, where it has these. Every core takes part.
Contenders that no figure is about have one turn.

Bytes of a step are those of its weights, which it must read, and of its cache; the roofline is how fast it were if this
took all its time, by the read bandwidth of the same run. Memory is read after the first 64 tokens, with nothing else in
it. `first` is the share of greedy tokens before one that is not transformers' in fp32. Ratios are of one round, see
`benchmarks.reach`. Exit code 1 where a figure is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import ROOT, measured
from benchmarks.compare_report import draw, row_of, table
from benchmarks.compare_rounds import DECODE, Found, measure, step_bytes
from benchmarks.contenders import genai, llama, openvino, ours, transformers
from benchmarks.contenders.base import made, size_of
from benchmarks.peers import write_sentencepiece
from benchmarks.reach import FIGURES, judge
from exporter.bench.process import Contender
from exporter.bench.rounds import leading
from exporter.cli._picture import check_plot
from runtime.bandwidth import Bandwidth
from runtime.errors import UserError
from runtime.hardware import cpu_name
from tests.support.environments import Failed

DIRECTORY = ROOT / "build" / "compare"
REFERENCE = f"{transformers.PEER} fp32"
PEERS: dict[str, dict[str, tuple[str, ...]]] = {
    "242m": {
        ours.PEER: ("fp32", "int8", "int4", "int4 compact"),
        llama.PEER: ("F32", "BF16", "Q8_0", "Q4_0"),
        genai.PEER: ("fp32", "int8", "int4"),
        openvino.PEER: ("int8", "int4"),
        transformers.PEER: ("fp32", "bf16"),
    },
    "minitron-4b": {ours.PEER: ("int4 compact",), llama.PEER: ("Q4_0",)},
}


def set_up(preset: str, peers: Sequence[str], place: Path) -> tuple[list[tuple[Contender, int]], dict[str, str]]:
    """The contenders of a preset with the bytes of what they load, and why a peer is not among them.

    All but OpenVINO can be had everywhere.
    """
    directory = place / preset
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = made(directory / "checkpoint", lambda output: _checkpoint(output, preset))
    makers: dict[str, Callable[[tuple[str, ...]], Iterator[tuple[Contender, Path]]]] = {
        ours.PEER: lambda names: ours.contenders(checkpoint, directory, names),
        llama.PEER: lambda names: llama.contenders(checkpoint, directory, place, names),
        genai.PEER: lambda names: genai.contenders(checkpoint, directory, place, names),
        openvino.PEER: lambda names: openvino.contenders(checkpoint, directory, place, names),
        transformers.PEER: lambda names: transformers.contenders(checkpoint, names),
    }
    contenders: list[tuple[Contender, int]] = []
    not_run = {peer: "not among --peers" for peer in PEERS[preset] if peer not in peers}
    for peer in (peer for peer in PEERS[preset] if peer in peers):
        print(f"setting up {peer}", file=sys.stderr, flush=True)
        try:
            contenders += [(one, size_of(files)) for one, files in makers[peer](PEERS[preset][peer])]
        except (Failed, SystemExit) as error:
            if peer != openvino.PEER:
                raise
            not_run[peer] = str(error).strip().splitlines()[-1]
    return contenders, not_run


def _checkpoint(output: Path, preset: str) -> None:
    measured([sys.executable, "-m", "benchmarks.make_checkpoint", "--preset", preset, output])
    write_sentencepiece(output)  # which llama.cpp's converter asks for


def report_of(
    preset: str, rounds: int, found: Sequence[Found], bandwidth: float, not_run: Mapping[str, str]
) -> dict[str, Any]:
    """The JSON of a comparison; `bandwidth` in bytes a second."""
    expected = next((one.tokens for one in found if one.contender.name == REFERENCE), None)
    contenders = {}
    for one in found:
        steps = {"decode": (1, step_bytes(one.contender, 1, DECODE.prompt + DECODE.steps // 2))}
        for name, work in one.works.items():
            middle = (work.capacity(1) + work.capacity(rounds + 1)) // 2
            steps[name] = work.rows, step_bytes(one.contender, work.rows, middle)
        agreement = None
        if expected is not None:
            agreement = round(statistics.mean(map(leading, one.tokens, expected)), 4)
        contenders[one.contender.name] = row_of(one.numbers, bandwidth, steps) | {
            "agreement": agreement,
            "weight_bytes": one.contender.weight_bytes,
            "cache_bytes_per_token": one.contender.cache_bytes,
            "versions": dict(one.contender.versions),
        }
    samples = {one.contender.name: one.numbers for one in found}
    machine = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "read_gb_s": round(bandwidth / 1e9, 2),
        "system": platform.platform(),
    }
    return {
        "schema": 1,
        "preset": preset,
        "rounds": rounds,
        "machine": machine,
        "not_run": dict(not_run),
        "contenders": contenders,
        "figures": [judge(figure, samples).to_json() for figure in FIGURES[preset]],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Set up, measure, print and write; exit code 1 where a figure is missed, 2 where a plot cannot be drawn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PEERS, default="242m")
    parser.add_argument("--rounds", type=int, choices=range(1, 65), metavar="N", default=7)
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
    place = given.directory.absolute()
    contenders, not_run = set_up(given.preset, given.peers, place)
    bandwidth = Bandwidth()
    bandwidth.measure()
    try:
        found = measure(contenders, given.rounds, FIGURES[given.preset], place / given.preset)
    except UserError as error:
        sys.exit(str(error))
    report = report_of(given.preset, given.rounds, found, bandwidth.measure(), not_run)
    results.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, plot)
    print(table(report))
    return int(any(figure["met"] is False for figure in report["figures"]))


if __name__ == "__main__":
    sys.exit(main())
