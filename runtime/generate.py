"""The generation loop: prefill a batch of prompts, decode until every row has finished. Knows no backend."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from runtime.errors import UserError
from runtime.sampling import Sampler, Sampling
from runtime.session import Floats, Session
from runtime.stopping import StopStrings
from runtime.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Settings:
    """When rows stop and how their tokens are chosen.

    Attributes:
        capacity: tokens of a row the cache may hold; a row that would pass it finishes with "length".
        max_new_tokens: tokens to add to each prompt at most.
        sampling: how a token is chosen.
        eos_token_ids: tokens that end a row; empty to go on after them.
        stop: strings that end a row.
        prefill_chunk: tokens of a prompt per step, to bound memory; None for all at once.
    """

    capacity: int
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    prefill_chunk: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("max_new_tokens", self.max_new_tokens), ("prefill_chunk", self.prefill_chunk)):
            if value is not None and value < 1:
                raise UserError(f"{name} should be at least 1; found {value}")


@dataclass(frozen=True)
class Event:
    """One new token of one row, the text it released (often none) and, if it is the last, why."""

    row: int
    token_id: int
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """What one row said: new tokens with the ending eos, text without prompt, eos or stop string."""

    prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None


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
        self,
        session: Session,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        settings: Settings,
        load_s: float = 0.0,
    ) -> None:
        """Prepare a batch; nothing runs before the first event is asked for.

        Args:
            session: with at least as many slots as prompts and `settings.capacity` tokens in each.
            tokenizer: of the same bundle.
            prompts: token ids of each row.
            settings: of all rows.
            load_s: seconds that loading took, for the result.

        Raises:
            UserError: no prompt, an empty one, or one longer than the capacity.
        """
        _check_prompts(prompts, settings.capacity, session.vocab_size)
        self._session = session
        self._settings = settings
        self._rows = [_Row(slot, ids, tokenizer, settings) for slot, ids in enumerate(prompts)]
        self._load_s, self._ttft_s, self._decode_s = load_s, 0.0, 0.0
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    def result(self) -> GenerationResult:
        """Run to the end and return everything generated."""
        for _ in self:
            pass
        decoded = sum(len(row.token_ids) - 1 for row in self._rows)
        speed = decoded / self._decode_s if decoded else None
        return GenerationResult(
            self._session.backend,
            [Completion(len(row.prompt), row.token_ids, row.text, row.finish_reason) for row in self._rows],
            Timing(self._load_s, self._ttft_s, speed),
        )

    def _run(self) -> Iterator[Event]:
        started = time.perf_counter()
        logits = prefill(self._session, [row.prompt for row in self._rows], self._settings.prefill_chunk)
        events = [row.take(logits[row.slot]) for row in self._rows]
        self._ttft_s = time.perf_counter() - started
        yield from events
        while live := [row for row in self._rows if row.finish_reason is None]:
            started = time.perf_counter()
            first, last = live[0].slot, live[-1].slot
            logits = self._decode(self._rows[first : last + 1])
            events = [row.take(logits[row.slot - first]) for row in live]
            self._decode_s += time.perf_counter() - started
            yield from events

    def _decode(self, rows: list[_Row]) -> Floats:
        """One token for each of these neighbouring rows.

        A row among them that has finished is carried along with an empty past: one batch of neighbouring
        slots reads the weights once, and nobody looks at the finished row's slot again.
        """
        live = [row.finish_reason is None for row in rows]
        tokens = [row.token_ids[-1] if alive else 0 for row, alive in zip(rows, live, strict=True)]
        past = [row.cached if alive else 0 for row, alive in zip(rows, live, strict=True)]
        ones, slots = np.ones(len(rows), np.int64), np.array([row.slot for row in rows])
        return self._session.step(np.array(tokens)[:, None], ones, np.array(past), slots)[:, -1]


class _Row:
    """One sequence of the batch: its tokens so far and what their text has released."""

    def __init__(self, slot: int, prompt: Sequence[int], tokenizer: Tokenizer, settings: Settings) -> None:
        self.slot = slot
        self.prompt = list(prompt)
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self._settings = settings
        self._sampler = Sampler(settings.sampling, prompt)
        self._decoder = tokenizer.stream()
        self._stops = StopStrings(settings.stop)

    @property
    def cached(self) -> int:
        """Tokens of this row in the cache: all but the newest, which the next step will write."""
        return len(self.prompt) + len(self.token_ids) - 1

    def take(self, logits: Floats) -> Event:
        """Choose the next token by float32 logits [vocab]; see what it releases, and if it ends the row."""
        token = self._sampler.choose(logits)
        self.token_ids.append(token)
        ended = token in self._settings.eos_token_ids
        text, stopped = self._stops.push("" if ended else self._decoder.push(token))
        full = len(self.token_ids) == self._settings.max_new_tokens or self.cached == self._settings.capacity
        if not stopped and (ended or full):
            rest, stopped = self._stops.push(self._decoder.flush())
            text += rest if stopped else rest + self._stops.flush()
        if stopped:
            self.finish_reason = "stop"
        elif ended:
            self.finish_reason = "eos"
        elif full:
            self.finish_reason = "length"
        self.text += text
        return Event(self.slot, token, text, self.finish_reason)


def prefill(session: Session, prompts: Sequence[Sequence[int]], chunk: int | None = None) -> Floats:
    """Write the prompts into slots 0, 1, … and return the logits after each, float32 [batch, vocab].

    Args:
        session: with empty slots.
        prompts: token ids of each row, of any lengths.
        chunk: tokens per step and row; None for all at once.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    width = int(lengths.max()) if chunk is None else chunk
    logits = np.empty((len(prompts), session.vocab_size), np.float32)
    for start in range(0, int(lengths.max()), width):
        rows = [row for row, length in enumerate(lengths) if length > start]
        pieces = [prompts[row][start : start + width] for row in rows]
        tokens = np.zeros((len(rows), max(map(len, pieces))), np.int64)
        for row, piece in enumerate(pieces):
            tokens[row, : len(piece)] = piece
        counts = np.array([len(piece) for piece in pieces])
        # A row's later chunks overwrite its earlier ones: what stays are the logits of its last token.
        logits[rows] = session.step(tokens, counts, np.full(len(rows), start), np.array(rows))[:, -1]
    return logits


def _check_prompts(prompts: Sequence[Sequence[int]], capacity: int, vocab_size: int) -> None:
    if not prompts:
        raise UserError("there is no prompt; give at least one")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {row + 1} is empty; give it at least one token")
        if len(prompt) > capacity:
            raise UserError(
                f"prompt {row + 1} has {len(prompt)} tokens, the capacity is {capacity}; shorten it, "
                "raise --max-length, or export the bundle with a larger one"
            )
        outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise UserError(
                f"prompt {row + 1}: token id {outside} is outside the vocabulary of {vocab_size}; "
                "use ids of this bundle's tokenizer"
            )
