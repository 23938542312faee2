"""Text to token ids and back: `tokenizer.json`, the chat template, and decoding that can be streamed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.manifest import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, read_json

if TYPE_CHECKING:
    from runtime.chat_template import ChatTemplate

Message = Mapping[str, Any]

# The names under which transformers hands a tokenizer's special tokens to its chat template.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_CONTEXT = 8  # tokens decoded again with each new one, so that it is read in its context
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Encoded:
    """A text, or a pair of texts, as tokens.

    Attributes:
        ids: token ids.
        offsets: the characters that each token stands for, as text[start:end] of its own text.
        special: whether the tokenizer added the token; such a token stands for no characters.
        parts: the text that each token is of, 0 or 1; None for those that were added.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    special: list[bool]
    parts: list[int | None]

    def take(self, positions: Sequence[int]) -> Encoded:
        """Some of the tokens."""
        columns = (self.ids, self.offsets, self.special, self.parts)
        return Encoded(*([column[at] for at in positions] for column in columns))  # type: ignore[arg-type]


class Tokenizer:
    """A bundle's tokenizer and chat template; agrees with transformers' on the same files."""

    def __init__(self, bundle: Bundle) -> None:
        """Read the tokenizer.

        Raises:
            UserError: a file is missing, or is no tokenizer.
        """
        import tokenizers

        self._bundle = bundle
        path = bundle.file(TOKENIZER)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            if type(error) is not Exception:  # the library raises its own errors as bare Exception
                raise
            raise UserError(f"{path} is no tokenizer ({error}); export the bundle again") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of raw text, with the special tokens the checkpoint puts around a text, or without them."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def encode_offsets(self, text: str, pair: str | None = None) -> Encoded:
        """Raw text, or a text and what belongs to it, with the special tokens the checkpoint puts around them."""
        found = self._tokenizer.encode(text, pair, add_special_tokens=True)
        special = [bool(flag) for flag in found.special_tokens_mask]
        return Encoded(list(found.ids), list(found.offsets), special, list(found.sequence_ids))

    def encode_chat(self, messages: Sequence[Message], *, continue_final_message: bool = False) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn.

        Args:
            messages: `{"role": "user", "content": …}` and so on, oldest first.
            continue_final_message: end within the last message instead, for the model to go on with it.

        Raises:
            UserError: no messages, no chat template, or the template refuses the conversation.
        """
        text = self.render_chat(messages, continue_final_message=continue_final_message)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def render_chat(self, messages: Sequence[Message], *, continue_final_message: bool = False) -> str:
        """The conversation as the text the model was trained on, up to where the assistant's turn begins."""
        if not messages:
            raise UserError("a chat needs at least one message")
        template = self._chat_template
        render = template.render_unfinished if continue_final_message else template.render
        return render(messages, self._special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of the token ids, without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it; empty where there is none of this id."""
        return self._tokenizer.id_to_token(token_id) or ""

    def join(self, tokens: Sequence[str]) -> str:
        """The text of tokens in the vocabulary's spelling, as transformers' `convert_tokens_to_string` has it."""
        decoder = self._tokenizer.decoder
        return " ".join(tokens) if decoder is None else str(decoder.decode(list(tokens)))

    @cached_property
    def unknown_id(self) -> int | None:
        """The token that stands for what the vocabulary lacks, if the checkpoint names one."""
        return self._named_id("unk_token")

    @cached_property
    def bos_id(self) -> int | None:
        """The token that a text begins with, if the checkpoint names one."""
        return self._named_id("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        """The token that a text ends with, if the checkpoint names one."""
        return self._named_id("eos_token")

    def special_id(self, text: str) -> int | None:
        """The special token that is spelled so; None where there is none."""
        token_id = self._tokenizer.token_to_id(text)
        return token_id if token_id in self._special_ids else None

    def _named_id(self, name: str) -> int | None:
        token = self._special_tokens.get(name)
        return None if token is None else self._tokenizer.token_to_id(token)

    @cached_property
    def marks_subwords(self) -> bool:
        """Whether the vocabulary spells a token that goes on with a word otherwise than one that begins it."""
        return bool(getattr(self._tokenizer.model, "continuing_subword_prefix", None))

    def stream(self) -> StreamDecoder:
        """A decoder for one growing sequence."""
        return StreamDecoder(self)

    def visible(self, token_id: int) -> bool:
        """Whether the token has text at all: not special, and known to the tokenizer."""
        return token_id not in self._special_ids and self._tokenizer.id_to_token(token_id) is not None

    def is_byte(self, token_id: int) -> bool:
        """Whether the token stands for one byte; runs of such tokens become text only together."""
        return _BYTE_TOKEN.fullmatch(self.token(token_id)) is not None

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        from runtime.chat_template import ChatTemplate

        if not self._bundle.has(CHAT_TEMPLATE):
            raise UserError(
                f"{self._bundle.path} has no chat template: its checkpoint is not made for chat; "
                "prompt it with raw text instead"
            )
        path = self._bundle.file(CHAT_TEMPLATE)
        return ChatTemplate(path.read_text(encoding="utf-8"), path)

    @cached_property
    def _special_tokens(self) -> dict[str, str]:
        if not self._bundle.has(TOKENIZER_CONFIG):
            return {}
        config = read_json(self._bundle.file(TOKENIZER_CONFIG))
        found = {name: token for name in _SPECIAL_TOKENS if (token := config.get(name)) is not None}
        return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}


class StreamDecoder:
    """Turns token ids, one at a time, into pieces of text that together are the decoded whole.

    No piece ends within a character: text that a further token may still change is held back until it is
    settled. The last few settled tokens are decoded again with the new ones, since a decoder may treat the
    first token specially (sentencepiece drops its leading space).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this token settles; empty where a character is not complete yet."""
        if not self._tokenizer.visible(token_id):
            return ""
        self._pending.append(token_id)
        if self._tokenizer.is_byte(token_id):
            return ""
        text = self._pending_text()
        if text.endswith(_REPLACEMENT):
            return ""
        self._context = [*self._context, *self._pending][-_CONTEXT:]
        self._pending = []
        return text

    def flush(self) -> str:
        """The text held back, as it stands: incomplete characters become U+FFFD."""
        text = self._pending_text()
        self._pending = []
        return text

    def _pending_text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode([*self._context, *self._pending])[len(before) :]
