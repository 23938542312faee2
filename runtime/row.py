"""One sequence: its settings, its tokens so far, and what each new one releases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from runtime.errors import UserError
from runtime.sampling import Sampler, Sampling
from runtime.session import Floats
from runtime.stopping import StopStrings
from runtime.tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Settings:
    """When a row stops and how its tokens are chosen.

    Attributes:
        capacity: tokens of a row the cache may hold; a row that would pass it finishes with "length".
        max_new_tokens: tokens to add to each prompt at most.
        sampling: how a token is chosen.
        eos_token_ids: tokens that end a row; empty to go on after them.
        stop: strings that end a row.
        prefill_chunk: tokens of a prompt per step, to bound memory; None for all at once.
        prompt_lookup: draft tokens from what the row says already, see `runtime.lookup`.
    """

    capacity: int
    max_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    eos_token_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    prefill_chunk: int | None = None
    prompt_lookup: bool = False

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


class Row:
    """A sequence: its prompt, its new tokens so far, and what their text has released."""

    def __init__(self, number: int, prompt: Sequence[int], tokenizer: Tokenizer, settings: Settings) -> None:
        """Begin with the prompt alone.

        Args:
            number: of the row, as in its events.
            prompt: token ids, at least one.
            tokenizer: of the bundle.
            settings: of this row.

        Raises:
            UserError: a stop string is empty.
        """
        self.number = number
        self.prompt = list(prompt)
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.settings = settings
        self._sampler = Sampler(settings.sampling, prompt)
        self._decoder = tokenizer.stream()
        self._stops = StopStrings(settings.stop)

    @property
    def length(self) -> int:
        """Tokens of the row that a step has seen, or will have when its newest is sent: all but that one."""
        return len(self.prompt) + len(self.token_ids) - 1

    @property
    def completion(self) -> Completion:
        """What it has said so far."""
        return Completion(len(self.prompt), self.token_ids, self.text, self.finish_reason)

    def take(self, logits: Floats) -> Event:
        """Choose the next token by float32 logits [vocab]; see what it releases, and if it ends the row.

        Raises:
            CheckFailed: the logits are not numbers.
        """
        token = self._sampler.choose(logits)
        self.token_ids.append(token)
        ended = token in self.settings.eos_token_ids
        text, stopped = self._stops.push("" if ended else self._decoder.push(token))
        full = len(self.token_ids) == self.settings.max_new_tokens or self.length == self.settings.capacity
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
        return Event(self.number, token, text, self.finish_reason)


def check_prompt(prompt: Sequence[int], capacity: int, vocab_size: int, name: str = "the prompt") -> None:
    """Refuse a prompt that no step can take.

    Raises:
        UserError: it is empty, longer than the capacity, or holds a token outside the vocabulary.
    """
    if not len(prompt):
        raise UserError(f"{name} is empty; give it at least one token")
    if len(prompt) > capacity:
        raise UserError(
            f"{name} has {len(prompt)} tokens, the capacity is {capacity}; shorten it, "
            "raise --max-length, or export the bundle with a larger one"
        )
    outside = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise UserError(
            f"{name}: token id {outside} is outside the vocabulary of {vocab_size}; use ids of this bundle's tokenizer"
        )
