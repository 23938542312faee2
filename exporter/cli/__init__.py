"""The command line: registers the commands, and is the one place where errors become messages and exit codes.

Exit codes: 0 done, 1 a check failed, 2 the user must change something, 130 interrupted.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import NoReturn

import click

from exporter import __version__
from exporter.cli._process import interrupt_on_termination, shadowing
from exporter.cli._requirements import remedy_for

PROGRAM = "nemotron-export"
INTERRUPTED = 130
BROKEN_PIPE = 141  # what a shell reports for a program that SIGPIPE ended

# Faults of the file system that the user can do something about.
_REMEDIES = {
    errno.ENOSPC: "free space there, or choose another place",
    errno.EDQUOT: "free space there, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose another place",
}


def main() -> NoReturn:
    """Run the command that the process was started for, and exit."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # text that the terminal cannot show must not end the program
    # Before torch loads OpenMP: threads that spin while they wait made checks ten times slower where cores were busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run(sys.argv[1:])
    gc.freeze()  # else Python looks through all of torch's objects once more before it goes: a second or two
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; what the user can act on becomes one line on stderr."""
    if problem := shadowing():
        return _fail(problem)
    try:
        with interrupt_on_termination():
            _invoke(arguments)
            print(end="", flush=True)  # here, where a failure has a message; and stdout may be closed
    except click.exceptions.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, click.Abort):
        # A terminal shows ^C, or half a line of text, where the cursor stands.
        click.echo("\ninterrupted" if sys.stderr.isatty() else "interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except Exception as error:
        message, code = _explain(error)
        if message is None:
            raise
        return _fail(message, code)
    return 0


class _Program(click.Group):
    """Lists its commands in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)


def commands() -> click.Group:
    """The program: every command, in the order of its help."""
    from exporter.cli.bench import bench
    from exporter.cli.build import build
    from exporter.cli.chat import chat
    from exporter.cli.compare import compare
    from exporter.cli.demo import demo
    from exporter.cli.diagnose import diagnose
    from exporter.cli.doctor import doctor
    from exporter.cli.eval import evaluate
    from exporter.cli.export import export
    from exporter.cli.generate import generate
    from exporter.cli.inspect import inspect
    from exporter.cli.package import package
    from exporter.cli.plan import plan
    from exporter.cli.predict import predict
    from exporter.cli.selftest import selftest
    from exporter.cli.verify import verify

    @click.group(
        PROGRAM,
        cls=_Program,
        commands=(
            demo,
            plan,
            export,
            verify,
            diagnose,
            build,
            package,
            selftest,
            generate,
            chat,
            predict,
            inspect,
            bench,
            compare,
            evaluate,
            doctor,
        ),
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    @click.version_option(__version__, prog_name=PROGRAM)
    def program() -> None:
        """Nemotron checkpoints as ONNX bundles: exported, checked against transformers, run without torch.

        \b
        nemotron-export demo                                  see the whole path work
        nemotron-export export ./Nemotron-Mini-4B ./bundle    checkpoint to bundle
        nemotron-export generate ./bundle -p "Our solar system is"
        """

    return program


def _invoke(arguments: Sequence[str]) -> None:
    # Not click's own `main`: it would take an EOFError of ours for an interruption.
    program = commands()
    with program.make_context(PROGRAM, list(arguments)) as context:
        program.invoke(context)


def _explain(error: Exception) -> tuple[str | None, int]:
    """What to tell the user, and the exit code; no message for an error that is a bug of ours."""
    from runtime.errors import UserError

    match error:
        case UserError():
            return str(error), error.exit_code
        case click.exceptions.NoArgsIsHelpError():
            return "no command is given; see nemotron-export --help", 2
        case click.ClickException():
            return _usage(error), 2
        case ModuleNotFoundError() if remedy := remedy_for(error.name):
            return f"{error.name} is not installed; {remedy}", 2
        case OSError() if remedy := _REMEDIES.get(error.errno or 0):
            if error.filename is None:  # only a stream that we did not open has no name
                _drop_output()
            return f"{error.filename or 'standard output'}: {error.strerror}; {remedy}", 2
    return None, 2


def _usage(error: click.ClickException) -> str:
    message = error.format_message().strip().rstrip(".")
    if not isinstance(error, click.UsageError) or error.ctx is None:
        return message
    return f"{message}; see {error.ctx.command_path} --help"


def _fail(message: str, code: int = 2) -> int:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    return code


def _drop_output() -> None:
    """Let nothing more be written to stdout: flushing it at exit would fail again."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
