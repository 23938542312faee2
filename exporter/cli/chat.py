"""`chat`: a conversation with a bundle."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli._console import note
from exporter.cli._options import PATH, backend_options, checked_text, generation_options, sampling_options
from exporter.cli._process import Terminated
from exporter.cli.generate import summary

if TYPE_CHECKING:
    from runtime.text_generation import Options, TextGenerator

Message = dict[str, str]


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@sampling_options
@backend_options
def chat(bundle: Path, system: str | None, backend: str, device: str | None, threads: int | None, **flags: Any) -> None:
    """Talk with BUNDLE; it remembers the conversation. Needs no torch.

    /exit or Ctrl-D ends; Ctrl-C stops the answer that is being given, and at the prompt it leaves. When the
    conversation no longer fits, its oldest turns are forgotten, with a note.

    \b
    nemotron-export chat ./bundle
    nemotron-export chat ./bundle --system "Answer in one sentence." --temperature 0.7
    """
    options = generation_options(flags)
    opening = [] if system is None else [{"role": "system", "content": checked_text(system, "--system")}]

    from runtime import load
    from runtime.bundle import Bundle
    from runtime.errors import UserError
    from runtime.manifest import CHAT_TEMPLATE

    opened = Bundle.open(bundle)
    opened.check_task("text-generation")
    if not opened.has(CHAT_TEMPLATE):  # better known before the weights are loaded
        raise UserError(f"{bundle} has no chat template; use nemotron-export generate")
    model = load(bundle, task="text-generation", backend=backend, device=device, threads=threads)
    for remark in model.remarks:
        note(remark)
    Conversation(model, opening, options).run()


class Conversation:
    """The turns so far, and the loop that adds to them."""

    def __init__(self, model: TextGenerator, opening: list[Message], options: Options) -> None:
        self._model = model
        self._batch = model.batch(slots=1)  # which still holds the turns before
        self._opening = opening
        self._options = options
        self._turns: list[Message] = []
        limit = model.max_length
        self._capacity = min(options.get("max_length") or limit, limit)
        # Room that an answer should find: what was asked for, but never most of the capacity.
        self._room = min(options.get("max_new_tokens", 256), self._capacity // 4)

    def run(self) -> None:
        """Read a message, answer it, until /exit or the end of the input."""
        from runtime.errors import CheckFailed, UserError

        interactive = sys.stdin.isatty()
        if interactive:
            with suppress(ImportError):
                import readline  # noqa: F401 - gives input() editing and history
            note("/exit or Ctrl-D ends, Ctrl-C stops an answer")
        while (text := _read(interactive)) is not None:
            try:
                self._answer(checked_text(text, "the message"))
            except CheckFailed:
                raise
            except UserError as error:  # the message is refused, the conversation goes on
                if not interactive:
                    raise
                click.echo(f"error: {error}", err=True)

    def _answer(self, text: str) -> None:
        self._turns.append({"role": "user", "content": text})
        answer = ""
        try:
            with closing(self._batch.stream([self._encode()], **self._options)) as generation:
                for event in generation:
                    click.echo(event.text, nl=False)
                    answer += event.text
                click.echo()
                note(summary(generation.result()))
        except Terminated:
            raise
        except KeyboardInterrupt:
            click.echo()
            note("stopped")
        finally:
            self._close_turn(answer)

    def _close_turn(self, answer: str) -> None:
        """Keep what was answered; forget a message that got no answer, as turns must alternate."""
        if answer.strip():
            self._turns.append({"role": "assistant", "content": answer})
        else:
            self._turns.pop()

    def _encode(self) -> list[int]:
        """The conversation as token ids, without its oldest turns where it would not fit."""
        from runtime.errors import UserError

        turns, ids = self._turns, []
        for start in range(0, len(turns), 2):
            ids = self._model.encode_chat(self._opening + turns[start:])
            if len(ids) + self._room <= self._capacity:
                break
        if len(ids) > self._capacity:
            raise UserError(
                f"the message makes {len(ids)} tokens, the capacity is {self._capacity}; shorten it, or "
                "export the bundle with a larger --max-length"
            )
        if start:
            self._turns = turns[start:]
            note("the conversation no longer fits: its oldest turns are forgotten")
        return ids


def _read(interactive: bool) -> str | None:
    """The next message that is not empty; None at the end."""
    from runtime.errors import UserError

    while True:
        try:
            text = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                click.echo()
            return None
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 ({error.reason}); convert it") from error
        if text == "/exit":
            return None
        if text:
            return text
