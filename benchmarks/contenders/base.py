"""A contender as the comparison sees it: what it is called, what it reads, and the process that it runs in."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import ROOT
from tests.support.environments import run

STOPPED_BY = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")  # what a user's shell may hold threads back with


@dataclass(frozen=True)
class Contender:
    """A peer at a precision.

    Attributes:
        peer: whose it is.
        precision: as the peer calls it.
        command: starts a process that speaks the protocol of `benchmarks.contenders.serve`.
        weight_bytes: of weights that a decode step reads: all matrices, and one row of the embedding.
        cache_bytes: of keys and values, per token.
        disk_bytes: of the files that it loads.
        versions: of what it is made of.
    """

    peer: str
    precision: str
    command: tuple[str | Path, ...]
    weight_bytes: int
    cache_bytes: int
    disk_bytes: int
    versions: dict[str, str]

    @property
    def name(self) -> str:
        """In tables and results: `llama.cpp Q4_0`."""
        return f"{self.peer} {self.precision}"

    def step_bytes(self, rows: int, context: int) -> int:
        """Bytes that a decode step reads: the rows share the weights, each has `context` tokens in its cache."""
        return self.weight_bytes + rows * context * self.cache_bytes


def made(path: Path, make: Callable[[Path], object]) -> Path:
    """`path`; where it is not there yet, `make` writes it under another name first: what is there is whole."""
    if not path.exists():
        partial = path.with_name(f"partial-{path.name}")
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        make(partial)
        partial.rename(path)
    return path


def python_command(python: Path | str, module: str, *arguments: str | Path) -> tuple[str | Path, ...]:
    """Run a neighbour of this file with an environment's Python."""
    return (python, "-m", f"benchmarks.contenders.{module}", *arguments)


def size_of(directory: Path) -> int:
    """Bytes of a directory's files."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def versions(python: Path | str, *packages: str) -> dict[str, str]:
    """Of packages in an environment."""
    script = "import json, sys, importlib.metadata as m; print(json.dumps({p: m.version(p) for p in sys.argv[1:]}))"
    found: dict[str, str] = json.loads(run([python, "-c", script, *packages]))
    return found


class Running:
    """A contender's process, stopped but for where it is `awake`: threads that spin would take the others' cores."""

    def __init__(self, contender: Contender, log: Path) -> None:
        """Start it and wait until its model is loaded."""
        self.contender, self._log = contender, log
        env = {name: value for name, value in os.environ.items() if not name.startswith(STOPPED_BY)}
        with log.open("w") as errors:
            self._process = subprocess.Popen(  # noqa: S603
                [str(part) for part in contender.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=env | {"PYTHONPATH": str(ROOT)},
                text=True,
            )
        self._answer()
        self._stop()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run for a while."""
        self._process.send_signal(signal.SIGCONT)
        yield
        self._stop()

    def prompt(self, state: str, file: Path, rows: int, length: int, capacity: int) -> tuple[float, list[int]]:
        """Seconds until each row's first new token, and these."""
        answer = self._ask("prompt", state, file, rows, length, capacity)
        return answer["seconds"], answer["tokens"]

    def decode(self, state: str, steps: int) -> tuple[float, list[list[int]]]:
        """Seconds of that many steps, and their tokens [steps][rows]."""
        answer = self._ask("decode", state, steps)
        return answer["seconds"], answer["tokens"]

    def memory(self) -> dict[str, int]:
        """Bytes resident now, and at most until now."""
        lines = Path(f"/proc/{self._process.pid}/status").read_text(encoding="utf-8").splitlines()
        held = dict(line.split(":", 1) for line in lines)
        return {name: int(held[key].split()[0]) * 1024 for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))}

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _ask(self, *words: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(*words, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            sys.exit(f"{self.contender.name} has ended:\n{self._log.read_text(errors='replace')[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer
