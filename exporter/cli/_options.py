"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from runtime.text_generation import Options

F = TypeVar("F", bound=Callable[..., Any])

BACKENDS = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx")
DEVICES = ("cpu", "cuda")
ATTENTIONS = ("native", "plugin")

PATH = click.Path(path_type=Path)


def _checkpoint(_ctx: click.Context, _param: click.Parameter, value: str) -> Path | str:
    """A directory as a path; a hub id as it is, for `./name` is no id and a path would drop the dot."""
    from exporter.hub import check_name

    check_name(value)
    return Path(value) if Path(value).is_dir() else value


def _reference(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | str | None:
    return None if value is None else _checkpoint(ctx, param, value)


def _adapter(_ctx: click.Context, _param: click.Parameter, value: Path | None) -> Path | None:
    from runtime.errors import UserError

    if value is not None and not value.is_dir():
        raise UserError(f"{value} is not a directory; give the one that peft saved the adapter to")
    return value


def _size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    from exporter.memory import parse_size

    return None if value is None else parse_size(value)


def takes_file(path: Path) -> bool:
    """Whether a file could be written there: no directory itself, in one that is there."""
    return not path.is_dir() and path.absolute().parent.is_dir()


class TokenIds(click.ParamType[list[int]]):
    """Token ids separated by commas."""

    name = "5,17,3"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Read the numbers."""
        if isinstance(value, list):
            return value
        try:
            return [int(token) for token in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not a list of token ids such as 5,17,3", param, ctx)


# Looked at before torch is imported: a mistyped path should not take seconds.
checkpoint_argument = click.argument("checkpoint", type=click.Path(), callback=_checkpoint)
reference_option = click.option(
    "--reference",
    metavar="CHECKPOINT",
    callback=_reference,
    help="Ask the checkpoint the same on transformers.",
)
memory_option = click.option(
    "--memory",
    metavar="SIZE",
    callback=_size,
    help="Memory that may be used in all: 24GiB, 16GB.  [default: what is available]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


checkpoint_options = _all(
    click.option("--revision", metavar="TEXT", help="Branch, tag or commit, where CHECKPOINT is a hub id."),
    click.option(
        "--adapter",
        type=PATH,
        callback=_adapter,
        help="A directory with a LoRA adapter (peft) to merge into CHECKPOINT.",
    ),
)

backend_options = _all(
    click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default="auto",
        show_default=True,
        help="What runs the model; auto takes an engine for this GPU where the bundle has one.",
    ),
    click.option("--device", type=click.Choice(DEVICES), help="Where ONNX Runtime runs.  [default: cpu]"),
    click.option("--threads", type=click.IntRange(min=1), help="Threads within an operator.  [default: one per core]"),
)

sampling_options = _all(
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="Tokens to add at most.",
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        help="Sample, with logits divided by this; 0 is greedy.",
    ),
    click.option("--top-k", type=click.IntRange(min=0), help="Sample among the k most likely tokens; 0 is all."),
    click.option(
        "--top-p",
        type=click.FloatRange(min=0, max=1, min_open=True),
        help="Sample among the most likely tokens that together reach this probability.",
    ),
    click.option(
        "--min-p",
        type=click.FloatRange(min=0, max=1),
        help="Sample among tokens at least this fraction as likely as the most likely.",
    ),
    click.option(
        "--repetition-penalty",
        type=click.FloatRange(min=0, min_open=True),
        help="Above 1, makes tokens seen before less likely.",
    ),
    click.option("--seed", type=click.IntRange(min=0), help="Repeat the same draws."),
    click.option("--greedy", is_flag=True, help="Take the most likely token, whatever the bundle's default."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End at this text, which is left out; repeatable."),
    click.option(
        "--prompt-lookup/--no-prompt-lookup",
        default=False,
        help="Draft tokens from what was said already; the same text, sooner where it repeats.  [default: no]",
    ),
    click.option(
        "--max-length",
        type=click.IntRange(min=1),
        help="Tokens a row may hold, prompt included.  [default and maximum: the bundle's]",
    ),
)


def generation_options(flags: dict[str, Any]) -> Options:
    """What the command line asked for, as the runtime takes it.

    Raises:
        click.UsageError: greedy and sampling are asked for at once.
    """
    if flags["greedy"]:
        for name in ("temperature", "top_k", "top_p", "min_p"):
            if flags[name] is not None:
                raise click.UsageError(
                    f"--greedy does not sample, so --{name.replace('_', '-')} means nothing; drop one"
                )
    options: Options = {
        "max_new_tokens": flags["max_new_tokens"],
        "greedy": flags["greedy"],
        "temperature": flags["temperature"],
        "top_k": flags["top_k"],
        "top_p": flags["top_p"],
        "min_p": flags["min_p"],
        "repetition_penalty": flags["repetition_penalty"],
        "seed": flags["seed"],
        "stop": flags["stop"],
        "max_length": flags["max_length"],
        "prompt_lookup": flags["prompt_lookup"],
    }
    return options


def checked_text(text: str, what: str) -> str:
    """Text that a tokenizer can take.

    Raises:
        UserError: it is empty, or holds bytes that are not UTF-8.
    """
    from runtime.errors import UserError

    if not text:
        raise UserError(f"{what} is empty; give some text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not UTF-8 ({text[error.start : error.end]!a}); convert it") from error
    return text
