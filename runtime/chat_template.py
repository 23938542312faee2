"""Chat templates, rendered as transformers does, in a sandbox: they come with checkpoints, unread."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runtime.errors import UserError

_CUT = "CUT_THE_TEXT_HERE "  # its space tells whether a template trims messages


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled `chat_template.jinja`."""

    def __init__(self, source: str, path: Path) -> None:
        """Compile a template's text; `path` names it in errors.

        Raises:
            UserError: it is not valid.
        """
        self._path = path
        environment = ImmutableSandboxedEnvironment(
            loader=jinja2.DictLoader({}),  # nothing to include
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise self._refusal(error) from error

    def render(self, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str]) -> str:
        """The conversation's text, up to where the assistant's next turn begins.

        Raises:
            UserError: the template refuses the conversation, or does what the sandbox forbids.
        """
        return self._rendered(messages, special_tokens, add_generation_prompt=True)

    def render_unfinished(self, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str]) -> str:
        """The conversation's text, up to the end of what its last message says; what closes a turn is left out.

        Raises:
            UserError: as `render`; or the last message is no text, or the template does not show all of it.
        """
        *before, last = messages
        content = last.get("content")
        if not isinstance(content, str):
            raise UserError(
                f"only a message of text can be gone on with; found {type(content).__name__} as its content"
            )
        marked = {**last, "content": content + _CUT}
        text = self._rendered([*before, marked], special_tokens, add_generation_prompt=False)
        if content.strip() not in text or _CUT.strip() not in text:
            raise UserError(f"{self._path} leaves out what the last message says, so it cannot be gone on with")
        at = text.rindex(_CUT.strip())
        return text[:at] if text.startswith(_CUT, at) else text[:at].rstrip()  # else the template trims what is said

    def _rendered(
        self, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str], *, add_generation_prompt: bool
    ) -> str:
        # Templates see plain JSON only, and a key without a value is a key that is not there.
        plain = json.loads(json.dumps([{k: v for k, v in m.items() if v is not None} for m in messages]))
        try:
            return self._template.render(
                messages=plain,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> UserError:
        reason = " ".join(str(error).split())
        return UserError(f"{self._path} refuses: {reason}; change the messages, or the checkpoint's template")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja2's own filter, without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
