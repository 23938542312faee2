"""Many requests on one session: they join and leave a running batch, each in a slot of the cache while it runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from runtime.errors import UserError
from runtime.lookup import Lookup, Pace
from runtime.request import Request
from runtime.row import Event, Row, Settings, check_prompt
from runtime.session import Floats, Session
from runtime.tokenizer import Tokenizer

PREFILL_CHUNK = 256  # tokens of prompts between two steps of the rows that are running
PADDING = 4  # tokens that cost about as much as a step of its own: 2 to 4 at int4 on two cores


@dataclass(eq=False)
class _Slot:
    """A row of the cache.

    Attributes:
        index: which.
        request: that runs in it.
        tokens: whose keys and values it holds; they stay when a request has left, for others that begin alike.
        lookup: of the request, where it asked for one.
        used: when it was last taken or left, as a count.
    """

    index: int
    request: Request | None = None
    tokens: list[int] = field(default_factory=list)
    lookup: Lookup | None = None
    pace: Pace = field(default_factory=Pace)
    used: int = 0

    @property
    def left(self) -> list[int]:
        """Tokens of the request's prompt that are not in the cache yet."""
        return [] if self.request is None else self.request.row.prompt[len(self.tokens) :]

    @property
    def decoding(self) -> bool:
        """Whether the request's next step is one of new tokens."""
        return self.request is not None and bool(self.request.row.token_ids)


class Scheduler:
    """Runs requests on a session's slots, in the order in which they come; not for several threads at once."""

    def __init__(self, session: Session, tokenizer: Tokenizer, *, prefill_first: bool = False) -> None:
        """Nothing runs before an event is asked for.

        Args:
            session: whose slots are used, all of them.
            tokenizer: of the same bundle.
            prefill_first: run prompts to their end before any other row goes on, and keep nothing of rows that have
                ended. By default a part of a prompt and a step of the rows that are running take turns, so that none
                of them stands still for long.
        """
        self.session, self._tokenizer = session, tokenizer
        self._prefill_first = prefill_first
        self._waiting: deque[Request] = deque()
        self._slots = [_Slot(index) for index in range(session.slots)]
        self._count = 0

    def submit(
        self, prompt: Sequence[int], settings: Settings, on_event: Callable[[Event], None] | None = None
    ) -> Request:
        """Queue a prompt.

        Args:
            prompt: token ids.
            settings: of this request; its capacity at most the session's.
            on_event: called with each event instead of keeping it for who iterates over the request. What it raises
                ends this request alone.

        Raises:
            UserError: the prompt can never run: empty, too long, or with tokens that there are not.
        """
        check_prompt(prompt, settings.capacity, self.session.vocab_size)
        most = min(settings.capacity, len(prompt) + settings.max_new_tokens - 1)
        if most > self.session.capacity:
            raise UserError(
                f"a prompt of {len(prompt)} tokens and {settings.max_new_tokens} new ones do not fit a slot of "
                f"{self.session.capacity}; ask for fewer, or for slots that hold more"
            )
        request = Request(self, Row(self._count, prompt, self._tokenizer, settings), on_event)
        self._count += 1
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Take a request out; what its slot holds stays for others that begin alike."""
        if request in self._waiting:
            self._waiting.remove(request)
        for slot in self._slots:
            if slot.request is request:
                self._leave(slot)

    def holds(self, request: Request) -> bool:
        """Whether the request waits or runs."""
        return request in self._waiting or any(slot.request is request for slot in self._slots)

    @property
    def prefilling(self) -> bool:
        """Whether a prompt waits, or is not in the cache to its end."""
        return bool(self._waiting) or any(slot.request and not slot.decoding for slot in self._slots)

    def run(self) -> None:
        """Step until nothing is left to do."""
        while self.step():
            pass

    def step(self) -> bool:
        """Let requests in, run a part of the prompts, then one step of every running row; whether anything ran.

        Raises:
            UserError: the backend has no memory for the step.
            CheckFailed: the backend cannot run it.
        """
        self._admit()
        starting = [slot for slot in self._slots if slot.request and not slot.decoding]
        running = [slot for slot in self._slots if slot.decoding]
        if starting:
            self._prefill(sorted(starting, key=lambda slot: slot.used))
        running = [slot for slot in running if slot.request]  # a callback may have cancelled some
        if running and not (starting and self._prefill_first):
            self._decode(running)
        return bool(starting or running)

    def _admit(self) -> None:
        """Put requests into free slots, where one begins like the prompt into that."""
        while self._waiting and (free := [slot for slot in self._slots if slot.request is None]):
            request = self._waiting.popleft()
            prompt = request.row.prompt
            alike = max(free, key=lambda slot: _reusable(slot.tokens, prompt))
            goes_on = 2 * _reusable(alike.tokens, prompt) > len(alike.tokens)  # else it is copied from, and stays
            slot = alike if goes_on else min(free, key=lambda slot: slot.used)
            slot.tokens, slot.request = slot.tokens[: _reusable(slot.tokens, prompt)], request
            slot.lookup = Lookup(prompt) if request.row.settings.prompt_lookup else None
            slot.pace, slot.used = Pace(), request.row.number + 1

    def _reuse(self, slot: _Slot) -> None:
        """Copy what another slot has in common with a prompt, where that is more than its own slot has."""
        assert slot.request is not None
        prompt = slot.request.row.prompt
        best = max(self._slots, key=lambda other: _reusable(other.tokens, prompt))
        common = _reusable(best.tokens, prompt)
        if common > len(slot.tokens):
            copied = self.session.copy_prefix(best.index, slot.index, common)
            slot.tokens = prompt[: max(copied, len(slot.tokens))]

    def _leave(self, slot: _Slot) -> None:
        """Free a slot; a static batch keeps nothing in it: nobody comes who could go on from there."""
        slot.request, slot.used = None, self._count
        if self._prefill_first:
            slot.tokens = []

    def _gather(self, slots: list[_Slot]) -> None:
        """Make running rows neighbours, one batch that reads the weights once, by exchanging them with others.

        What lies between would have to be carried along, at a CPU's cost of a row that runs; moving one costs as much
        once.
        """
        while len(slots) <= slots[-1].index - slots[0].index:
            last = slots[-1]
            gap = next(slot for slot in self._slots[slots[0].index :] if slot not in slots)
            if not self.session.exchange(gap.index, last.index, max(len(gap.tokens), len(last.tokens))):
                return
            self._slots[gap.index], self._slots[last.index] = last, gap
            gap.index, last.index = last.index, gap.index
            slots.sort(key=lambda slot: slot.index)

    def _prefill(self, slots: list[_Slot]) -> None:
        """A part of the first prompt, and with it others that are as short."""
        first = slots[0]
        self._reuse(first)
        together = [first]
        for slot in slots[1:]:
            if not self._together([*together, slot]):
                break
            together.append(slot)
        together.sort(key=lambda slot: slot.index)
        pieces = [slot.left[: self._chunk(slot)] for slot in together]
        logits = self._run(together, pieces)
        for slot, piece, row in zip(together, pieces, logits, strict=True):
            slot.tokens += piece
            if slot.request and not slot.left:
                self._take(slot, row)

    def _chunk(self, slot: _Slot) -> int:
        """Tokens of a prompt that are run at once."""
        assert slot.request is not None
        return slot.request.row.settings.prefill_chunk or (len(slot.left) if self._prefill_first else PREFILL_CHUNK)

    def _together(self, slots: list[_Slot]) -> bool:
        """Whether prompts cost less in one batch: whole, new, and hardly padded; and none can have another's start."""
        widths = [len(slot.left) for slot in slots]
        if any(slot.tokens or width > self._chunk(slot) for slot, width in zip(slots, widths, strict=True)):
            return False  # several tokens after a past are a batch of their own to ONNX Runtime
        padded = len(widths) * max(widths)
        alike = max(_common(slot.left, slots[-1].left) for slot in slots[:-1])
        return padded <= PREFILL_CHUNK and padded - sum(widths) <= PADDING * (len(slots) - 1) and alike <= PADDING

    def _decode(self, slots: list[_Slot]) -> None:
        """One step of running rows; of one alone, with a draft where there is one."""
        alone = slots[0] if len(slots) == 1 and slots[0].lookup is not None else None
        draft = [] if alone is None else self._draft(alone)
        self._gather(slots)
        # What still lies between the rows, where slots cannot be exchanged, is carried along.
        batch = self._slots[slots[0].index : slots[-1].index + 1]
        started = time.perf_counter()
        logits = self._run(batch, [[_newest(slot), *draft] for slot in batch], keep=1 + len(draft))
        seconds = time.perf_counter() - started
        for slot in slots:
            slot.tokens += [_newest(slot), *draft]
        for slot in slots:
            if slot.request is None:
                continue  # another's callback has cancelled it
            held = self._take(slot, logits[slot.index - slots[0].index], draft)
            if slot is alone and draft:
                slot.pace.drafted(len(draft), held, seconds)
            elif slot is alone:
                slot.pace.single(seconds)

    def _draft(self, slot: _Slot) -> list[int]:
        assert slot.request is not None
        assert slot.lookup is not None
        row = slot.request.row
        room = min(row.settings.capacity - row.length, row.settings.max_new_tokens - len(row.token_ids)) - 1
        return slot.lookup.draft(min(slot.pace.most, room))

    def _run(self, slots: list[_Slot], pieces: list[list[int]], keep: int = 1) -> Floats:
        """Send tokens behind those of slots, which are in order; logits [batch, keep, vocab]."""
        lengths = np.array([len(piece) for piece in pieces])
        tokens = np.zeros((len(slots), lengths.max()), np.int64)
        for row, piece in enumerate(pieces):
            tokens[row, : len(piece)] = piece
        for slot in slots:
            if slot.request is None and len(slot.tokens) == self.session.capacity:
                del slot.tokens[-1]  # the token that is carried along needs a place
        past = np.array([len(slot.tokens) for slot in slots])
        return self.session.step(tokens, lengths, past, np.array([slot.index for slot in slots]), keep=keep)

    def _take(self, slot: _Slot, logits: Floats, draft: Sequence[int] = ()) -> int:
        """Choose tokens by a row's logits [1 + draft, vocab] for as long as the draft holds; how much of it held."""
        request = slot.request
        assert request is not None
        held = 0
        for position, drafted in zip(logits, [*draft, None], strict=True):
            token = request.take(position)
            if token is not None and slot.lookup is not None:
                slot.lookup.extend([token])
            if request.finished or slot.request is not request or token != drafted:
                break
            held += 1
        del slot.tokens[len(slot.tokens) - len(draft) + held :]
        if request.finished and slot.request is request:
            self._leave(slot)
        return held


def _newest(slot: _Slot) -> int:
    """The token that a running row sends next; any for others, whose tokens nobody looks at."""
    return slot.request.row.token_ids[-1] if slot.request and slot.decoding else 0


def _reusable(tokens: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens in common that are worth a step of the prompt's own: not the few that most prompts begin with."""
    common = _common(tokens, prompt)
    return common if common > PADDING else 0


def _common(tokens: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens that both begin with, less than the whole prompt: its last token is run for its logits."""
    most = min(len(tokens), len(prompt) - 1)
    return next((n for n in range(most) if tokens[n] != prompt[n]), most)
