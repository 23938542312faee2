"""Stop strings in streamed text: the text before one is kept, the string or its start never shown."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.errors import UserError


class StopStrings:
    """Watches one row's text for the stop string that is completed first.

    Text that may turn out to be the start of a stop string is held back. What is released does not depend on
    how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UserError("a stop string is empty; leave it out")
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; return the text released and whether a stop string was met. After that, push no more."""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, start = min(found)  # the first to be complete; of two that end together, the longer
            released, self._held = self._held[:start], ""
            return released, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        split = len(self._held) - keep
        released, self._held = self._held[:split], self._held[split:]
        return released, False

    def flush(self) -> str:
        """The text held back, once the row has ended otherwise."""
        released, self._held = self._held, ""
        return released


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of the text that is a start of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
