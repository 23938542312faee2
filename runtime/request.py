"""A prompt that waits or runs among others, and the events that it gives."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from runtime.errors import CheckFailed
from runtime.row import Completion, Event, Row
from runtime.session import Floats

if TYPE_CHECKING:
    from runtime.scheduler import Scheduler


class Request(Iterator[Event]):
    """A submitted prompt: iterate over its events, which runs the scheduler on; `close` it to have it forgotten."""

    def __init__(self, scheduler: Scheduler, row: Row, on_event: Callable[[Event], None] | None) -> None:
        self.row = row
        self.failure: Exception | None = None
        self._scheduler = scheduler
        self._events: deque[Event] = deque()
        self._on_event = on_event or self._events.append

    @property
    def finished(self) -> bool:
        """Whether no more events will come."""
        return self.row.finish_reason is not None or self.failure is not None

    def __next__(self) -> Event:
        """The next event.

        Raises:
            Exception: what ended this request: its callback's error, or logits that are not numbers.
        """
        while not self._events:
            if self.failure is not None:
                raise self.failure
            if self.finished or not self._scheduler.holds(self):
                raise StopIteration
            self._scheduler.step()
        return self._events.popleft()

    def result(self) -> Completion:
        """Run to the request's end; what it has said."""
        for _ in self:
            pass
        return self.row.completion

    def close(self) -> None:
        """Forget the request: its slot is free at once, and no other notices."""
        self._scheduler.cancel(self)

    def take(self, logits: Floats) -> int | None:
        """Choose the next token and tell it; the token, or None where the request has failed."""
        try:
            event = self.row.take(logits)
        except CheckFailed as failure:
            self.failure = failure
            return None
        try:
            self._on_event(event)
        except Exception as failure:  # noqa: BLE001 - the caller's own code: it ends the caller's own request
            self.failure = failure
            return None
        return event.token_id
