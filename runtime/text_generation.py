"""What `load` returns for a bundle of task text-generation: prompts in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, Unpack

import numpy as np

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.generate import Generation, GenerationResult, Settings
from runtime.sampling import Sampling
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
        ignore_eos: go on after the tokens that end a text.
        max_length: tokens a row may hold, prompt included (default and maximum: the bundle's, or the engine's).
        prefill_chunk: tokens of a prompt per step (all).
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
    ignore_eos: bool
    max_length: int | None
    prefill_chunk: int | None


class TextGenerator:
    """A bundle on a backend. Each call has a cache of its own; the weights are shared.

    `remarks` are what a user should know of it: why this backend, and that it was not checked where it was not.
    `load_s` are the seconds that loading took, `check_s` those of them that went into proving the bundle here.
    """

    def __init__(self, bundle: Bundle, session: Session, load_s: float, check_s: float = 0.0) -> None:
        self.bundle = bundle
        self.tokenizer = Tokenizer(bundle)
        self.backend, self.device = session.backend, session.device
        self.remarks = remarks(bundle, session.choice)
        self.max_length = session.max_capacity
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
        ids = [self._encode(prompt) for prompt in _as_batch(prompts)]
        settings = self._settings(options)
        wanted = max(map(len, ids), default=1) + settings.max_new_tokens - 1
        capacity = min(max(wanted, 1), settings.capacity)
        session = self._session.reopen(slots=max(len(ids), 1), capacity=capacity)
        return Generation(session, self.tokenizer, ids, settings, self.load_s)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as a prompt: token ids up to where the assistant's next turn begins.

        Args:
            messages: `{"role": "user", "content": …}` and so on, oldest first.
        """
        return self.tokenizer.encode_chat(messages)

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if not prompt:
            raise UserError("a prompt is empty; give some text")
        return self.tokenizer.encode(prompt)

    def _settings(self, options: Options) -> Settings:
        """The loop's settings: the caller's options, the checkpoint's defaults, the bundle's limits."""
        limit = self.max_length
        capacity = options.get("max_length")
        capacity = limit if capacity is None else capacity
        if not 1 <= capacity <= limit:
            raise UserError(
                f"max_length should be within 1..{limit}, what {self.bundle.path} has on {self.backend}; "
                f"found {capacity}"
            )
        stop = options.get("stop", ())
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
            eos_token_ids=frozenset() if options.get("ignore_eos") else self.bundle.eos_token_ids,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            prefill_chunk=options.get("prefill_chunk"),
        )


def _as_batch(prompts: Prompts) -> Sequence[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int | np.integer)):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]
