"""This project's own runtime among the contenders, driven as a user does: by `runtime.load(…).stream(…)`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.bench.process import memory_of
from exporter.bench.serve import decode, prompt

if TYPE_CHECKING:
    from runtime.generate import Event
    from runtime.text_generation import TextGenerator


class Ours:
    """A bundle that is loaded, and generations that go on; a driver as `exporter.bench.serve` has it."""

    packages: tuple[str, ...] = ("onnxruntime", "numpy")
    weight_bytes: int | None = None
    cache_bytes: int | None = None

    def __init__(self, model: TextGenerator) -> None:
        self._model = model
        self._states: dict[str, tuple[Iterator[Event], int]] = {}

    def prompt(self, state: str, prompts: NDArray[np.int32], capacity: int) -> list[int]:
        """Begin a generation as long as the capacity allows, the old one's memory given back."""
        self._states.pop(state, None)
        rows, length = prompts.shape
        most = capacity - length + 1  # the last is not written
        events = self._model.stream(list(prompts.tolist()), greedy=True, ignore_eos=True, max_new_tokens=most)
        self._states[state] = events, rows
        return self.step(state)

    def step(self, state: str) -> list[int]:
        """The next event of every row."""
        events, rows = self._states[state]
        return [event.token_id for event in islice(events, rows)]


class Here:
    """A model in this very process, where `exporter.bench.process.Running` has one in another."""

    def __init__(self, model: TextGenerator) -> None:
        self.name = "nemotron-export"
        self._driver = Ours(model)

    def awake(self) -> AbstractContextManager[None]:
        """Its threads sleep soon after a step."""
        return nullcontext()

    def prompt(self, state: str, file: Path, rows: int, length: int, capacity: int) -> tuple[float, list[int]]:
        """Seconds until each row's first new token, and these."""
        return prompt(self._driver, state, str(file), rows, length, capacity)

    def decode(self, state: str, steps: int) -> tuple[float, list[list[int]]]:
        """Seconds of that many steps, and their tokens [steps][rows]."""
        return decode(self._driver, state, steps)

    def memory(self) -> dict[str, int]:
        """See `memory_of`."""
        return memory_of("self")
