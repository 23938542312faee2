"""Commands run in this process behind their real error boundary, and a model that says what a test wants."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exporter.cli import run
from runtime.generate import Completion, Event, GenerationResult, Timing

ROOT = Path(__file__).parents[3]
PROGRAM = [sys.executable, "-c", "from exporter.cli import main; main()"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command here: `cli("inspect", path)`."""

    def invoke(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return invoke


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command in a process of its own: `process("inspect", path)`."""

    def invoke(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [*PROGRAM, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False, **options)

    return invoke


@dataclass
class FakeModel:
    """Answers the n-th call with `answers[n]`: the pieces of each row, or an exception in place of a piece."""

    answers: list[Any] = field(default_factory=list)
    max_length: int = 100
    template: bool = True
    remarks: tuple[str, ...] = ()
    prompts: list[Any] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)

    @property
    def bundle(self) -> Any:
        manifest = SimpleNamespace(max_length=self.max_length, task="text-generation")
        return SimpleNamespace(manifest=manifest, has=lambda name: self.template, check_task=lambda task: None)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[str]:
        """A token a word, so that tests can read a prompt."""
        return [word for message in messages for word in f"{message['role']}: {message['content']}".split()]

    def batch(self, slots: int) -> FakeModel:
        """One that is always empty."""
        return self

    def stream(self, prompts: Sequence[Any], **options: Any) -> FakeGeneration:
        self.prompts.append(prompts)
        self.options = options
        answer = self.answers.pop(0)
        return FakeGeneration(answer if isinstance(answer, list) else [answer], len(prompts))


class FakeGeneration:
    """Pieces are (row, text); the last of each row finishes it."""

    def __init__(self, pieces: list[Any], rows: int) -> None:
        self.pieces = [piece if isinstance(piece, tuple | BaseException) else (0, piece) for piece in pieces]
        self.texts = [""] * rows

    def __iter__(self) -> Iterator[Event]:
        last = {piece[0]: at for at, piece in enumerate(self.pieces) if isinstance(piece, tuple)}
        for at, piece in enumerate(self.pieces):
            if isinstance(piece, BaseException):
                raise piece
            row, text = piece
            self.texts[row] += text
            yield Event(row, 7, text, "eos" if at == last[row] else None)

    def close(self) -> None:
        self.pieces = []

    def result(self) -> GenerationResult:
        if not any(self.texts):
            list(self)
        rows = [Completion(3, [7, 2], text, "eos") for text in self.texts]
        return GenerationResult("onnxruntime-cpu", rows, Timing(0.5, 0.01, 123.4))


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """What `load` returns, whatever the path."""
    fake = FakeModel()

    def load(path: Path, **options: Any) -> FakeModel:
        fake.loaded = {"path": path, **options}
        return fake

    monkeypatch.setattr("runtime.load", load)
    monkeypatch.setattr("runtime.bundle.Bundle.open", lambda path: fake.bundle)
    return fake
