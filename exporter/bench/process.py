"""A contender in a process of its own: what it is called, what it reads, and requests to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from exporter.bench.serve import Unable
from runtime.errors import UserError

STOPPED_BY = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_")  # what a user's shell may hold threads back with
_START = Path(__file__).with_name("start.py")
_SAID = 2000  # bytes of a log that are looked at


@dataclass(frozen=True)
class Contender:
    """A peer at a precision.

    Attributes:
        peer: whose it is.
        precision: as the peer calls it; may be empty.
        command: starts a process that speaks the protocol of `exporter.bench.serve`.
        weight_bytes: of weights that a decode step reads: all matrices, and one row of the embedding; None where
            nobody can tell.
        cache_bytes: of keys and values, per token; None likewise.
        versions: of what it is made of.
    """

    peer: str
    precision: str
    command: tuple[str | Path, ...]
    weight_bytes: int | None = None
    cache_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """In tables and results: `llama.cpp Q4_0`."""
        return f"{self.peer} {self.precision}".rstrip()

    def step_bytes(self, rows: int, context: int) -> int | None:
        """Bytes that a decode step reads: the rows share the weights, each has `context` tokens in its cache."""
        if self.weight_bytes is None or self.cache_bytes is None:
            return None
        return self.weight_bytes + rows * context * self.cache_bytes

    def told(self, ready: Mapping[str, Any]) -> Contender:
        """With what its driver knows of the model that it has loaded."""
        known = {name: value for name in ("weight_bytes", "cache_bytes") if (value := ready.get(name)) is not None}
        return replace(self, versions={**self.versions, **ready.get("versions", {})}, **known)


class Ended(UserError):
    """A contender's process has ended of itself; the message names it, with the end of what it said."""


def driver_command(python: Path | str, driver: str, *arguments: str | Path | int) -> tuple[str | Path, ...]:
    """Run one of `exporter.bench.drivers` with an environment's Python."""
    return (python, _START, f"exporter.bench.drivers.{driver}", *map(str, arguments))


def memory_of(process: int | str) -> dict[str, int]:
    """Bytes of a process (an id, or `self`), files that it maps included: resident now, and at most until now."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    held = dict(line.split(":", 1) for line in lines)
    return {name: int(held[key].split()[0]) * 1024 for name, key in (("resident", "VmRSS"), ("peak", "VmHWM"))}


class Running:
    """A contender's process, stopped but for where it is `awake`: threads that spin would take the others' cores.

    `contender` has what its driver told of it.
    """

    def __init__(self, contender: Contender, log: Path, directory: Path) -> None:
        """Start it in a directory and wait until its model is loaded; what it says goes to `log`.

        Raises:
            Ended: it does not load.
            UserError: its program cannot be started.
        """
        self.contender, self._log = contender, log
        env = {name: value for name, value in os.environ.items() if not name.startswith(STOPPED_BY)}
        try:
            with log.open("w") as errors:
                self._process = subprocess.Popen(  # noqa: S603
                    [str(part) for part in contender.command],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    cwd=directory,
                    env=env,
                    text=True,
                )
        except OSError as error:
            raise UserError(f"{contender.name} cannot be started: {error}; name a program that is there") from error
        try:
            self.contender = contender.told(self._answer())
        except BaseException:  # an interruption too: nobody else knows of the process yet
            self.close()
            raise
        self._stop()

    @property
    def name(self) -> str:
        """The contender's."""
        return self.contender.name

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run for a while."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._stop()

    def prompt(self, state: str, file: Path, rows: int, length: int, capacity: int) -> tuple[float, list[int]]:
        """Seconds until each row's first new token, and these.

        Raises:
            Unable: that is beyond the model.
        """
        answer = self._ask("prompt", state, file, rows, length, capacity)
        return answer["seconds"], answer["tokens"]

    def decode(self, state: str, steps: int) -> tuple[float, list[list[int]]]:
        """Seconds of that many steps, and their tokens [steps][rows]."""
        answer = self._ask("decode", state, steps)
        return answer["seconds"], answer["tokens"]

    def memory(self) -> dict[str, int]:
        """See `memory_of`."""
        return memory_of(self._process.pid)

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                try:
                    stream.close()
                except BrokenPipeError:  # a request that it did not read
                    continue

    def _stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _ask(self, *words: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            print(*words, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._ended() from None
        answer = self._answer()
        if "unable" in answer:
            raise Unable(answer["unable"])
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _ended(self) -> Ended:
        """How it went, and the last line of what it said: where Python and most others put the reason."""
        code = self._process.wait()
        self.close()
        how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        said = self._log.read_bytes()[-_SAID:].decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        return Ended(f"{self.name} has ended {how}: {last}")
