"""lm-eval's idea of a language model, answered by a bundle: tokens as its transformers backend makes them, no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from exporter.harness.paths import Query
from exporter.harness.scoring import Tokens, score
from runtime.errors import UserError
from runtime.text_generation import Options, TextGenerator

SEED = 1234  # of draws, where a task samples; lm-eval's own
NEW_TOKENS = 256  # of a task that does not say how many, as lm-eval's transformers backend has it
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")

Progress = Callable[[str, int, int], None]


class BundleLM(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed throughout
    """A loaded bundle as an `lm_eval.api.model.LM`.

    `tokens` counts what loglikelihoods asked for and what the model computed for them. A stop string that is one
    special token ends a text as that token; one that holds a special token among others is not found, for generated
    text has none.
    """

    def __init__(
        self,
        model: TextGenerator,
        *,
        batch_size: int = 8,
        max_length: int | None = None,
        progress: Progress = lambda *_: None,
    ) -> None:
        """Nothing runs yet.

        Args:
            model: of task text-generation.
            batch_size: rows that run at once, at most; fewer where the backend has fewer.
            max_length: tokens of a row (default and maximum: the model's); of longer texts the beginning is cut off.
            progress: called with "loglikelihood" or "generate", what is done and how much there is.

        Raises:
            UserError: `max_length` is out of range, or the checkpoint names no token that a text begins or ends with.
        """
        super().__init__()
        self._model, self._tokenizer, self._progress = model, model.tokenizer, progress
        self.batch_size = min(batch_size, model.max_slots or batch_size)
        self.max_length = model.max_length if max_length is None else max_length
        if not 2 <= self.max_length <= model.max_length:
            raise UserError(
                f"--max-length should be within 2..{model.max_length}, what {model.bundle.path} has on "
                f"{model.backend}; found {self.max_length}"
            )
        ends = (self._tokenizer.eos_id, *sorted(model.bundle.eos_token_ids))
        self._ends = frozenset(token for token in ends if token is not None)
        prefix = (self._tokenizer.bos_id, *(token for token in ends if token is not None))
        self._prefix = next((token for token in prefix if token is not None), None)
        if self._prefix is None:
            raise UserError(
                f"{model.bundle.path} names no token that a text begins or ends with; set bos_token in the "
                "checkpoint's tokenizer_config.json and export it again"
            )
        self._prefix_text = self._tokenizer.token(self._prefix)
        self.tokens = Tokens()

    @property
    def eot_token_id(self) -> int | None:
        """The token that a text ends with."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        """The token that stands where there is no context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """What a cache of prompts would be called after."""
        return str(self._model.bundle.manifest.source.name)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, with the special tokens of a text unless it begins with them already, or as it is asked for."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        return self._tokenizer.encode(string, special=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without its system message where the template takes none."""
        render = self._tokenizer.render_chat
        try:
            return render(chat_history, continue_final_message=not add_generation_prompt)
        except UserError:
            spoken = [message for message in chat_history if message["role"] != "system"]
            if len(spoken) == len(chat_history):
                raise
            return render(spoken, continue_final_message=not add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether greedy decoding would say it."""
        for request in requests:
            if not request.args[1]:
                raise UserError(
                    f"task {request.task_name}: a choice of document {request.doc_id} is empty; give it some text"
                )
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Log-probability of each text, in windows as long as a row, each token with as much before it as fits."""
        windows: list[tuple[None, list[int], list[int]]] = []
        ends = []
        for (text,) in (request.args for request in requests):
            found = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *utils.make_disjoint_window(window)) for window in found]
            ends.append(len(windows))
        values = [value for value, _ in self._loglikelihood_tokens(windows)]
        return [sum(values[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = True,  # noqa: ARG002 - lm-eval's signature
        **_: Any,
    ) -> list[tuple[float, bool]]:
        queries = [self._query(*request) for request in requests]
        scores = score(
            lambda slots, capacity: self._model.session(slots=slots, capacity=capacity),
            queries,
            self.batch_size,
            self.tokens,
            lambda done, total: self._progress("loglikelihood", done, total),
        )
        return [(found.logprob, found.greedy) for found in scores]

    def _query(self, texts: Any, context: list[int], continuation: list[int]) -> Query:
        shown = "a text" if texts is None else repr(texts[1][:40])
        if not continuation:
            raise UserError(f"{shown} has no token of its own behind its context; give the choice more text")
        if len(continuation) > self.max_length:
            raise UserError(
                f"{shown} has {len(continuation)} tokens, more than the {self.max_length} of a row; raise "
                "--max-length, or export the bundle with a larger one"
            )
        return Query([*context, *continuation][-(self.max_length + 1) :][:-1], continuation)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Continue each context until one of its stop strings, the end of the text, or as many tokens as it may have.

        Raises:
            UserError: a task asks for more tokens than a row holds, or for a way to choose them that there is not.
        """
        if not requests:
            return []
        asked = [self._generation(number, *request.args) for number, request in enumerate(requests)]
        longest = max(len(prompt) + options["max_new_tokens"] for prompt, options, _ in asked)
        batch = self._model.batch(
            slots=min(self.batch_size, len(requests)), max_length=min(longest, self._model.max_length)
        )
        running = [batch.submit(prompt, **options) for prompt, options, _ in asked]
        texts = []
        for request, (_, _, until) in zip(running, asked, strict=True):
            said = self._tokenizer.decode(request.result().token_ids)
            texts.append(str(postprocess_generated_text(said, until, None)))
            self._progress("generate", sum(other.finished for other in running), len(running))
        return texts

    def _generation(
        self, number: int, context: str, gen_kwargs: dict[str, Any]
    ) -> tuple[list[int], Options, list[str]]:
        """A request's prompt, its options, and the strings that end its text."""
        wishes = dict(normalize_gen_kwargs(gen_kwargs, NEW_TOKENS))
        end = self._tokenizer.token(self.eot_token_id) if self.eot_token_id is not None else None
        until = [text for text in handle_stop_sequences(wishes.pop("until"), eos=end) if text]
        new, sample = wishes.pop("max_gen_toks"), wishes.pop("do_sample")
        if unknown := sorted(set(wishes) - {*_SAMPLING, "repetition_penalty"}):
            known = ", ".join(("until", "max_gen_toks", "do_sample", *_SAMPLING, "repetition_penalty"))
            raise UserError(f"a task asks for {unknown[0]} when it generates; what this can do is {known}")
        if new >= self.max_length:
            raise UserError(
                f"a task asks for up to {new} new tokens, and a row holds {self.max_length}; lower that with "
                "--gen-kwargs max_gen_toks=N, or export the bundle with a larger --max-length"
            )
        special = {text: self._tokenizer.special_id(text) for text in until}
        options: Options = {
            "max_new_tokens": new,
            "stop": [text for text, token in special.items() if token is None],
            "eos_token_ids": sorted(self._ends | {token for token in special.values() if token is not None}),
            "seed": SEED + number,
            "greedy": not sample,
            "repetition_penalty": wishes.get("repetition_penalty"),
        }
        if sample:
            options |= {name: wishes[name] for name in _SAMPLING if name in wishes}  # type: ignore[typeddict-item]
        return self.tok_encode(context)[-(self.max_length - new) :], options, until
