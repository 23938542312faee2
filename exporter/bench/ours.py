"""This project's own runtime among the contenders, driven as a user does: by `runtime.load(…).stream(…)`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporter.bench.process import memory_of
from exporter.bench.serve import decode, prompt
from runtime.errors import UserError

if TYPE_CHECKING:
    from exporter.bench.measure import Case
    from runtime.bundle import Bundle
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


def check_fits(model: TextGenerator, cases: Sequence[Case], new_tokens: int) -> None:
    """Refuse rows that pass what a model holds.

    Raises:
        UserError: there are such.
    """
    for case in cases:
        if case.prompt_tokens + new_tokens > model.max_length:
            raise UserError(
                f"a prompt of {case.prompt_tokens} tokens and {new_tokens} new ones pass the {model.max_length} that "
                f"{model.bundle.path} has on {model.backend}; take fewer"
            )
        if model.max_slots is not None and case.batch > model.max_slots:
            raise UserError(
                f"a batch of {case.batch} passes the {model.max_slots} rows that {model.bundle.path} has on "
                f"{model.backend}; take a smaller --batch-size"
            )


def step_bytes(bundle: Bundle, rows: int, context: int) -> int | None:
    """That a decode step reads: the weights once, and each row's cache of `context` tokens; None where untold."""
    weights = bundle.manifest.step_bytes
    if weights is None:
        return None
    cached = bundle.cache_geometry.bytes_per_token if bundle.has_cache else 0
    return weights + rows * context * cached
