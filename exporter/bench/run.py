"""A bundle and its peers: started, measured in turn, and told."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from exporter.bench.measure import Case, Prompts, measure
from exporter.bench.ours import Here, check_fits, step_bytes
from exporter.bench.process import Contender, Running
from exporter.bench.report import Speed, speeds
from runtime.text_generation import TextGenerator

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PeerReport:
    """Of one peer: who, the seconds until its model was loaded, its process's peak in bytes, and its speeds."""

    contender: Contender
    load_s: float
    peak_bytes: int
    speeds: tuple[Speed, ...]

    def to_json(self) -> dict[str, Any]:
        """One of the `peers` of the command `bench`."""
        return {
            "name": self.contender.peer,
            "precision": self.contender.precision or None,
            "versions": dict(self.contender.versions),
            "load_s": self.load_s,
            "peak_rss_mb": self.peak_bytes / 1e6,
            "speeds": [speed.to_peer_json() for speed in self.speeds],
        }


@dataclass(frozen=True)
class Report:
    """What was measured.

    Attributes:
        new_tokens, rounds, threads: as they were asked for.
        speeds: ours, of every case.
        bandwidth: bytes per second that the machine's memory is read at; None where the model runs on a GPU.
        cold_s: seconds of our very first generation to its first tokens.
        peak_bytes: of this process, resident, when every case had run once.
        peers: in the order in which they were named.
    """

    new_tokens: int
    rounds: int
    threads: int | None
    speeds: tuple[Speed, ...]
    bandwidth: float | None
    cold_s: float
    peak_bytes: int
    peers: tuple[PeerReport, ...]


def run(
    model: TextGenerator,
    cases: Sequence[Case],
    contenders: Sequence[Contender] = (),
    *,
    new_tokens: int = 64,
    rounds: int = 3,
    threads: int | None = None,
    progress: Progress = lambda *_: None,
) -> Report:
    """Measure a bundle, and peers beside it, whose processes are ended whatever happens.

    Args:
        model: what is measured.
        cases: batches and prompts.
        contenders: its peers.
        new_tokens: of each row, at least 2.
        rounds: how often each case is measured; a round ahead of them is not counted.
        threads: that read memory at once when its bandwidth is measured (default: one per core).
        progress: called with "peers" or "bench", how much is done and how much there is.

    Raises:
        UserError: rows of a case pass what the model holds, or a peer does not start, or ends.
    """
    check_fits(model, cases, new_tokens)
    with tempfile.TemporaryDirectory(prefix="nemotron-export-bench-") as temporary, ExitStack() as stack:
        scratch = Path(temporary)
        running, load_s = [], []
        for number, contender in enumerate(contenders):
            progress("peers", number, len(contenders))
            started = time.perf_counter()
            running.append(Running(contender, scratch / f"{number}.log", scratch))
            stack.callback(running[-1].close)
            load_s.append(time.perf_counter() - started)
        ours = Here(model)
        measured = measure(
            [ours, *running],
            cases,
            Prompts(model.bundle, scratch),
            new_tokens=new_tokens,
            rounds=rounds,
            threads=threads,
            reads_memory=model.backend == "onnxruntime-cpu",
            progress=partial(progress, "bench"),
        )
    mine = measured.taken[ours.name]
    peers = [
        PeerReport(
            peer.contender,
            loaded,
            measured.peak_bytes[peer.name],
            speeds(measured, peer.name, new_tokens, peer.contender.step_bytes, mine),
        )
        for peer, loaded in zip(running, load_s, strict=True)
    ]
    own = speeds(measured, ours.name, new_tokens, partial(step_bytes, model.bundle))
    peak = measured.peak_bytes[ours.name]
    return Report(new_tokens, rounds, threads, own, measured.bandwidth, measured.cold_s, peak, tuple(peers))
