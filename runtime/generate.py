"""A batch of prompts from start to end, its events and what it took. Knows no backend."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.errors import UserError
from runtime.row import Completion, Event, Settings, check_prompt
from runtime.scheduler import Scheduler

__all__ = ["Completion", "Event", "Generation", "GenerationResult", "Settings", "Timing"]


@dataclass(frozen=True)
class Timing:
    """Seconds to load the model and from the start to the first token; decode speed of the whole batch."""

    load_s: float
    ttft_s: float
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class GenerationResult:
    """The completions of a batch, in the order of its prompts."""

    backend: str
    sequences: list[Completion]
    timing: Timing

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the command `generate`."""
        return {
            "schema": 1,
            "backend": self.backend,
            "sequences": [vars(sequence) for sequence in self.sequences],
            "timing": vars(self.timing),
        }


class Generation(Iterator[Event]):
    """A running generation: iterate over its events as they come, or call `result` to have it finished."""

    def __init__(
        self, scheduler: Scheduler, prompts: Sequence[Sequence[int]], settings: Settings, load_s: float = 0.0
    ) -> None:
        """Prepare a batch; nothing runs before the first event is asked for.

        Args:
            scheduler: that runs it; more prompts than it has slots wait until one is free.
            prompts: token ids of each row.
            settings: of all rows.
            load_s: seconds that loading took, for the result.

        Raises:
            UserError: no prompt, an empty one, or one longer than the capacity.
        """
        if not prompts:
            raise UserError("there is no prompt; give at least one")
        for number, prompt in enumerate(prompts, start=1):
            check_prompt(prompt, settings.capacity, scheduler.session.vocab_size, f"prompt {number}")
        self._scheduler = scheduler
        self._told: deque[Event] = deque()
        self._requests = [scheduler.submit(prompt, settings, self._told.append) for prompt in prompts]
        self._first = self._requests[0].row.number
        self._load_s, self._ttft_s, self._decode_s = load_s, 0.0, 0.0
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """Forget the rows that have not ended."""
        for request in self._requests:
            request.close()

    def result(self) -> GenerationResult:
        """Run to the end and return everything generated."""
        for _ in self:
            pass
        rows = [request.row for request in self._requests]
        decoded = sum(len(row.token_ids) - 1 for row in rows)
        speed = decoded / self._decode_s if decoded else None
        return GenerationResult(
            self._scheduler.session.backend, [row.completion for row in rows], Timing(self._load_s, self._ttft_s, speed)
        )

    def _run(self) -> Iterator[Event]:
        while True:
            while self._told:
                event = self._told.popleft()
                yield replace(event, row=event.row - self._first)
            for request in self._requests:
                if request.failure is not None:
                    raise request.failure
            if not any(self._scheduler.holds(request) for request in self._requests):
                return
            prefilling, started = self._scheduler.prefilling, time.perf_counter()
            self._scheduler.step()
            seconds = time.perf_counter() - started
            if prefilling:
                self._ttft_s += seconds
            else:
                self._decode_s += seconds
