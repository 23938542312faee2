"""What `load` returns for a bundle of task text-generation: prompts in, text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict, Unpack

import numpy as np

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.generate import Generation, GenerationResult, Settings
from runtime.request import Request
from runtime.row import Event
from runtime.sampling import Sampling
from runtime.scheduler import Scheduler
from runtime.session import Session, remarks
from runtime.tokenizer import Message, Tokenizer

Prompt = str | Sequence[int]
Prompts = Prompt | Sequence[Prompt]


class Options(TypedDict, total=False):
    """Options of `generate` and `stream`; what is absent comes from the bundle's generation_config.json.

    Attributes:
        max_new_tokens: tokens to add at most (256).
        greedy: take the most likely token each time.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `runtime.sampling.Sampling`.
        stop: one or more strings that end a row; they are not part of its text.
        eos_token_ids: tokens that end a row (the checkpoint's).
        ignore_eos: go on after the tokens that end a text.
        max_length: tokens a row may hold, prompt included (default and maximum: the bundle's, or the engine's).
        prefill_chunk: tokens of a prompt per step (all; where requests join and leave, 256).
        prompt_lookup: draft tokens from what the row says already, and check several in a step: the same text, sooner
            where it repeats its prompt; only while a row is alone.
    """

    max_new_tokens: int
    greedy: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str]
    eos_token_ids: Sequence[int] | None
    ignore_eos: bool
    max_length: int | None
    prefill_chunk: int | None
    prompt_lookup: bool


class TextGenerator:
    """A bundle on a backend. Each call has a cache of its own; the weights are shared.

    `remarks` are what a user should know of it: why this backend, and that it was not checked where it was not.
    `max_length` is the longest a row may be, `max_slots` how many may run at once; None where memory alone limits them.
    `load_s` are the seconds that loading took, `check_s` those of them that went into proving the bundle here.
    """

    def __init__(self, bundle: Bundle, session: Session, load_s: float, check_s: float = 0.0) -> None:
        self.bundle = bundle
        self.tokenizer = Tokenizer(bundle)
        self.backend, self.device = session.backend, session.device
        self.remarks = remarks(bundle, session.choice)
        self.max_length = session.max_capacity
        self.max_slots = session.max_slots
        self._session = session
        self.load_s, self.check_s = load_s, check_s

    def generate(self, prompts: Prompts, **options: Unpack[Options]) -> GenerationResult:
        """Continue the prompts and return their completions.

        Args:
            prompts: a text, a list of token ids, or a list of texts and lists of token ids: one batch.
            options: see `Options`.

        Raises:
            UserError: an empty prompt, one longer than the capacity, a token id outside the vocabulary, or an
                option out of its range.
        """
        return self.stream(prompts, **options).result()

    def stream(self, prompts: Prompts, **options: Unpack[Options]) -> Generation:
        """Like `generate`, but iterable: one event per new token, with the text it releases."""
        ids, settings = [self.encode(prompt) for prompt in _as_batch(prompts)], self.settings(options)
        wanted = max(map(len, ids), default=1) + settings.max_new_tokens - 1
        capacity = min(max(wanted, 1), settings.capacity)
        session = self._session.reopen(slots=max(len(ids), 1), capacity=capacity)
        return Generation(Scheduler(session, self.tokenizer, prefill_first=True), ids, settings, self.load_s)

    def batch(self, *, slots: int = 8, max_length: int | None = None) -> RunningBatch:
        """A batch that requests join and leave, on a cache of its own.

        Args:
            slots: requests that run at once; others wait.
            max_length: tokens of each, prompt included (default and maximum: `max_length`).

        Raises:
            UserError: more slots or tokens than the backend has, or no memory for them.
        """
        session = self._session.reopen(slots=slots, capacity=self.max_length if max_length is None else max_length)
        return RunningBatch(self, Scheduler(session, self.tokenizer))

    def session(self, *, slots: int, capacity: int) -> Session:
        """The model below the text, with a cache of its own: for who feeds tokens and reads logits.

        Raises:
            UserError: more slots or tokens than the backend has, or no memory for them.
        """
        return self._session.reopen(slots=slots, capacity=capacity)

    def encode_chat(self, messages: Sequence[Message], *, continue_final_message: bool = False) -> list[int]:
        """A conversation as a prompt: token ids up to where the assistant's next turn begins.

        Args:
            messages: `{"role": "user", "content": …}` and so on, oldest first.
            continue_final_message: end within the last message instead, for the model to go on with it.
        """
        return self.tokenizer.encode_chat(messages, continue_final_message=continue_final_message)

    def encode(self, prompt: Prompt) -> Sequence[int]:
        """A prompt's token ids.

        Raises:
            UserError: an empty text.
        """
        if not isinstance(prompt, str):
            return prompt
        if not prompt:
            raise UserError("a prompt is empty; give some text")
        return self.tokenizer.encode(prompt)

    def settings(self, options: Options) -> Settings:
        """A row's settings: the caller's options, the checkpoint's defaults, the bundle's limits.

        Raises:
            UserError: an option out of its range.
        """
        limit = self.max_length
        capacity = options.get("max_length")
        capacity = limit if capacity is None else capacity
        if not 1 <= capacity <= limit:
            raise UserError(
                f"max_length should be within 1..{limit}, what {self.bundle.path} has on {self.backend}; "
                f"found {capacity}"
            )
        stop, ends = options.get("stop", ()), options.get("eos_token_ids")
        if ends is None:
            ends = list(self.bundle.eos_token_ids)
        return Settings(
            capacity=capacity,
            max_new_tokens=options.get("max_new_tokens", 256),
            sampling=Sampling.from_config(
                self.bundle.generation_config,
                greedy=options.get("greedy", False),
                temperature=options.get("temperature"),
                top_k=options.get("top_k"),
                top_p=options.get("top_p"),
                min_p=options.get("min_p"),
                repetition_penalty=options.get("repetition_penalty"),
                seed=options.get("seed"),
            ),
            eos_token_ids=frozenset(() if options.get("ignore_eos") else ends),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            prefill_chunk=options.get("prefill_chunk"),
            prompt_lookup=options.get("prompt_lookup", False),
        )


class RunningBatch:
    """Requests of unequal length that join and leave; each answers as it would alone. For one thread.

    A prompt that begins like what a slot holds, of a request that runs or has ended, is computed from there on: a
    conversation's next turn costs its new tokens only.
    """

    def __init__(self, model: TextGenerator, scheduler: Scheduler) -> None:
        self._model, self._scheduler = model, scheduler

    def submit(
        self, prompt: Prompt, on_event: Callable[[Event], None] | None = None, **options: Unpack[Options]
    ) -> Request:
        """Queue a prompt; iterate over the request for its events, which runs all others on too.

        Args:
            prompt: a text or a list of token ids.
            on_event: called with each event, instead of keeping it for who iterates.
            options: see `Options`.

        Raises:
            UserError: the prompt or an option is none, or does not fit a slot.
        """
        return self._scheduler.submit(self._model.encode(prompt), self._model.settings(options), on_event)

    def stream(self, prompts: Prompts, **options: Unpack[Options]) -> Generation:
        """Like `TextGenerator.stream`, beside the requests that run."""
        ids = [self._model.encode(prompt) for prompt in _as_batch(prompts)]
        return Generation(self._scheduler, ids, self._model.settings(options), self._model.load_s)

    def step(self) -> bool:
        """Run every request a step further; whether there was any."""
        return self._scheduler.step()

    def run(self) -> None:
        """Run until every request has ended."""
        self._scheduler.run()


def _as_batch(prompts: Prompts) -> Sequence[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]
