"""Texts and conversations gone on with, as transformers' `text-generation` returns them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict, Unpack, cast, overload

from runtime.errors import UserError
from runtime.pipelines.base import Pipeline
from runtime.request import Request
from runtime.row import check_prompt
from runtime.text_generation import Options, TextGenerator
from runtime.tokenizer import Message

BATCH = 8
MAX_NEW_TOKENS = 256
# As transformers' pipeline: over these come generation_config.json, the pipeline's arguments, the call's.
_DEFAULTS: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 50}
_WITHOUT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}  # what None means

Result = dict[str, Any]
Returned = Literal["tokens", "new", "full"]


class GenerationArguments(TypedDict, total=False):
    """Arguments of a call; what is absent comes from the bundle's generation_config.json, then from transformers.

    Attributes:
        max_new_tokens: tokens to add at most (256).
        max_length: tokens of a prompt and what is added to it; `max_new_tokens` goes before it.
        do_sample: draw tokens (default); else take the likeliest each time.
        temperature, top_k, top_p, min_p, repetition_penalty: see `runtime.sampling.Sampling`; None for none.
        seed: of the draws; of several sequences of a prompt the next has the next seed. (transformers has `set_seed`.)
        num_return_sequences: how often each prompt is gone on with (1).
        stop_sequence: one or more strings that end a text; they are part of it.
        eos_token_id: one or more tokens that end a text; None for none.
        pad_token_id: nothing is padded here, so any will do.
        return_full_text: the prompt with what was added (default), or the latter alone.
        return_tensors: token ids in place of text.
        continue_final_message: let the model go on with a conversation's last message (default: if the assistant says
            it) instead of answering it.
        batch_size: sequences that run at once (8).
    """

    max_new_tokens: int | None
    max_length: int | None
    do_sample: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    num_return_sequences: int | None
    stop_sequence: str | Sequence[str] | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    return_full_text: bool | None
    return_tensors: bool | None
    continue_final_message: bool | None
    batch_size: int


@dataclass(frozen=True)
class _Prompt:
    """What to go on with.

    Attributes:
        given: a text, or a conversation's messages.
        ids: its tokens.
        continues: whether its last message is gone on with.
    """

    given: str | list[Message]
    ids: Sequence[int]
    continues: bool = False

    def with_text(self, text: str) -> str | list[Message]:
        """The prompt with what was added to it."""
        if isinstance(self.given, str):
            return self.given + text
        if self.continues:
            last = self.given[-1]
            return [*self.given[:-1], {"role": last["role"], "content": last["content"] + text}]
        return [*self.given, {"role": "assistant", "content": text}]


class TextGenerationPipeline(Pipeline[TextGenerator]):
    """A bundle of task text-generation; `model.stream` has a text's pieces as they come."""

    task: ClassVar[str] = "text-generation"
    known: ClassVar[tuple[str, ...]] = tuple(GenerationArguments.__annotations__)

    @overload
    def __call__(self, text_inputs: str, **arguments: Unpack[GenerationArguments]) -> list[Result]: ...
    @overload
    def __call__(self, text_inputs: list[str], **arguments: Unpack[GenerationArguments]) -> list[list[Result]]: ...
    @overload
    def __call__(self, text_inputs: list[dict[str, str]], **arguments: Unpack[GenerationArguments]) -> list[Result]: ...
    @overload
    def __call__(
        self, text_inputs: list[list[dict[str, str]]], **arguments: Unpack[GenerationArguments]
    ) -> list[list[Result]]: ...
    def __call__(self, text_inputs: Any, **arguments: Unpack[GenerationArguments]) -> Any:
        """Go on with texts, or answer conversations; what each gives does not depend on the others.

        Args:
            text_inputs: a text, a conversation (`[{"role": "user", "content": …}, …]`), or a list of either.
            arguments: see `GenerationArguments`.

        Returns:
            `[{"generated_text": …}]`, one for each of `num_return_sequences`: of a text it with what was added, of a
            conversation its messages with the assistant's; with `return_full_text=False` what was added. With
            `return_tensors` `[{"generated_token_ids": [int, …]}]`, the prompt's tokens first. For a list of texts or
            conversations a list of those.

        Raises:
            UserError: an unknown argument or one out of its range, an empty prompt or one longer than the bundle
                takes, no chat template, or messages that it refuses.
        """
        chosen = self._arguments(arguments)
        returned = _returned(arguments, chosen)
        given, alone = _inputs(text_inputs)
        prompts = [self._prompt(number, each, chosen) for number, each in enumerate(given, start=1)]
        settings = self._settings(chosen)
        count = _sequences(settings)
        found = iter(self._generate(prompts, settings, count))
        rows = [[self._record(prompt, next(found), returned) for _ in range(count)] for prompt in prompts]
        return rows[0] if alone else rows

    def _prompt(self, number: int, given: str | list[Message], chosen: dict[str, Any]) -> _Prompt:
        if isinstance(given, str):
            prompt = _Prompt(given, self.model.encode(given))
        else:
            continues = chosen.get("continue_final_message")
            continues = given[-1]["role"] == "assistant" if continues is None else bool(continues)
            prompt = _Prompt(given, self.model.encode_chat(given, continue_final_message=continues), continues)
        bundle = self.model.bundle
        check_prompt(prompt.ids, self.model.max_length, bundle.vocab_size, f"prompt {number}")
        return prompt

    def _generate(self, prompts: Sequence[_Prompt], settings: dict[str, Any], count: int) -> list[list[int]]:
        """New tokens of each sequence, those of a prompt behind each other."""
        jobs = [
            (prompt.ids, _options(len(prompt.ids), settings, sequence))
            for prompt in prompts
            for sequence in range(count)
        ]
        size = settings["batch_size"]
        if size < 1:
            raise UserError(f"batch_size should be at least 1, not {size}")
        longest = max(len(ids) + options["max_new_tokens"] - 1 for ids, options in jobs)
        batch = self.model.batch(
            slots=min(size, len(jobs), self.model.max_slots or size),
            max_length=max(min(longest, self.model.max_length), 1),
        )
        requests: list[Request] = [batch.submit(ids, **options) for ids, options in jobs]
        return [request.result().token_ids for request in requests]

    def _settings(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments over the checkpoint's and transformers' defaults."""
        config = {name: value for name, value in self.model.bundle.generation_config.items() if value is not None}
        own = {  # what generation_config.json has no say in
            "num_return_sequences": chosen.get("num_return_sequences"),
            "batch_size": chosen.get("batch_size", BATCH),
            "eos_token_id": chosen.get("eos_token_id", list(self.model.bundle.eos_token_ids)),
        }
        settings = _DEFAULTS | config | chosen | own
        return settings | {name: none for name, none in _WITHOUT.items() if settings.get(name) is None}

    def _record(self, prompt: _Prompt, token_ids: Sequence[int], returned: Returned) -> Result:
        if returned == "tokens":
            return {"generated_token_ids": [*prompt.ids, *token_ids]}
        text = self.model.tokenizer.decode(token_ids)  # with a stop string, unlike a completion's
        return {"generated_text": prompt.with_text(text) if returned == "full" else text}


def _inputs(text_inputs: object) -> tuple[list[str | list[Message]], bool]:
    """Texts and conversations, and whether it is one alone."""
    if isinstance(text_inputs, str):
        return [text_inputs], True
    if isinstance(text_inputs, list | tuple):
        if not text_inputs:
            raise UserError("there is no prompt; give at least one")
        if all(isinstance(each, Mapping) for each in text_inputs):
            return [_conversation(text_inputs)], True
        if all(isinstance(each, str) for each in text_inputs):
            return list(text_inputs), False
        if all(isinstance(each, list | tuple) for each in text_inputs):
            return [_conversation(each) for each in text_inputs], False
    found = {type(each).__name__ for each in text_inputs} if isinstance(text_inputs, list | tuple) else set()
    raise UserError(
        "text_inputs should be a text, a conversation (a list of messages), or a list of either; found "
        f"{type(text_inputs).__name__}" + (f" of {', '.join(sorted(found))}" if found else "")
    )


def _conversation(messages: Sequence[Any]) -> list[Message]:
    if not messages:
        raise UserError("a conversation is empty; give at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise UserError(f'a message should be {{"role": …, "content": …}}; found {message!r}')
    return list(cast("Sequence[Message]", messages))


def _returned(given: Mapping[str, Any], chosen: dict[str, Any]) -> Returned:
    """What of a sequence; of two arguments that exclude each other the call's goes before the pipeline's."""
    if given.get("return_tensors") and given.get("return_full_text") is not None:
        raise UserError("return_full_text is about text, and return_tensors asks for none; leave one out")
    if chosen.get("return_tensors") and given.get("return_full_text") is None:
        return "tokens"
    return "new" if chosen.get("return_full_text") is False else "full"


def _options(length: int, settings: Mapping[str, Any], sequence: int) -> Options:
    """Our names for what was chosen, for a prompt of this length."""
    ends = settings["eos_token_id"]
    return Options(
        max_new_tokens=_new_tokens(length, settings),
        greedy=not settings["do_sample"],
        temperature=settings["temperature"],
        top_k=settings["top_k"],
        top_p=settings["top_p"],
        min_p=settings["min_p"],
        repetition_penalty=settings["repetition_penalty"],
        seed=None if settings.get("seed") is None else settings["seed"] + sequence,
        stop=settings.get("stop_sequence") or (),
        eos_token_ids=() if ends is None else (ends,) if isinstance(ends, int) else ends,
    )


def _sequences(settings: Mapping[str, Any]) -> int:
    """How often each prompt is gone on with."""
    count = 1 if settings["num_return_sequences"] is None else int(settings["num_return_sequences"])
    if count < 1:
        raise UserError(f"num_return_sequences should be at least 1, not {count}")
    if count > 1 and not settings["do_sample"]:
        raise UserError(f"{count} sequences without do_sample would all be the same; give do_sample=True, or ask for 1")
    return count


def _new_tokens(length: int, settings: Mapping[str, Any]) -> int:
    """How many tokens may be added to a prompt of this length."""
    if (count := settings.get("max_new_tokens")) is not None:
        return int(count)
    if (total := settings.get("max_length")) is None:
        return MAX_NEW_TOKENS
    if length >= total:
        raise UserError(f"a prompt has {length} tokens, max_length is {total} with what is added; raise it")
    return int(total) - length
