"""The documentation's commands and programs: what a page shows, what they print, and how the two are compared.

A console block holds commands, `$ ` before each, and what they print on stdout; of a command that fails, what it says
on stderr too. A Python block may be followed by a text block with what it prints. `...` stands for anything. The word
behind `console` or `python` says what a block needs that is not everywhere; those are not run:

    gpu, hub    a GPU, or a model hub
    host        another machine, or a change of this one: a container, an installation

`python tools/pages.py PAGE…` runs pages and writes what they print into them, where it is not what they show.
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PROGRAM = "nemotron-export"
NEEDS = {"", "gpu", "hub", "host"}
SHELL = {"|", ">", "&&"}  # words that make a line the shell's

# What differs between two runs: times, rates, memory, and errors that are rounding's.
_MEASURED = (
    (re.compile(r"(peak memory|memory|bandwidth) +\d[\d.]* [kMG]?B(/s)?"), r"\1 #"),
    (re.compile(r"\d[\d.]*(–\d[\d.]*)? ?(s|ms|min|h|tokens/s|GFLOP/s|[kMG]B/s)\b"), "# s"),
    (re.compile(r"seconds .*"), "seconds #"),
    (re.compile(r"\b(\d(\.\d+)?e-\d+|0\.0\d+)"), "#e"),
    (re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[\d.]*Z"), "#Z"),
    (re.compile(r" +"), " "),
)


MEASURING = {"bench", "plan"}  # commands that print nothing else, and are processes of their own


@dataclass(frozen=True)
class Example:
    """A command or a program, and what the page shows that it prints.

    Attributes:
        source: the command without its `$ `, or the program.
        shown: lines, each with its end; None for a program that no text block follows.
        python: whether it is a program.
        needs: one of NEEDS.
        line: the first line of what it prints, counted from 0: there `shown` stands in the page.
    """

    source: str
    shown: str | None
    python: bool
    needs: str
    line: int

    @property
    def words(self) -> list[str]:
        """The command's, without comments."""
        return shlex.split(self.source, comments=True)

    @property
    def command(self) -> str:
        """The program's command, where it is one."""
        return "" if self.python or self.words[0] != PROGRAM else "".join(self.words[1:2])

    def shows(self, printed: str) -> bool:
        """Whether the page shows what was printed, but for what is measured."""
        return same(self.shown or "", printed, self.command)


def examples(text: str) -> Iterator[Example]:
    """What a page shows, in its order."""
    fence = re.compile(r"^```(console|python)(?: (\w+))?\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)
    for block in fence.finditer(text):
        kind, needs, body, printed = block.groups()
        first = text.count("\n", 0, block.start(3))
        if kind == "python":
            line = first if printed is None else text.count("\n", 0, block.start(4))
            yield Example(body, printed, True, needs or "", line)
            continue
        lines = body.splitlines(keepends=True)
        at = [index for index, line in enumerate(lines) if line.startswith("$ ")]
        for start, end in zip(at, [*at[1:], len(lines)], strict=True):
            shown = "".join(lines[start + 1 : end])
            yield Example(lines[start][2:].strip(), shown, False, needs or "", first + start + 1)


def inline(text: str) -> Iterator[list[str]]:
    """The commands that a page names within its text, as words."""
    prose = re.sub(r"^```.*?^```\n", "", text, flags=re.M | re.S)
    for span in re.findall(r"`([^`]+)`", prose):
        if span.startswith((f"{PROGRAM} ", "python -m ", "make ")):
            yield shlex.split(" ".join(span.replace("\\|", "|").split()))


def same(shown: str, printed: str, command: str = "") -> bool:
    """Whether a page shows what a command of the program, or another one, printed, but for what is measured."""
    texts = [_comparable(text, command) for text in (shown, printed)]
    return doctest.OutputChecker().check_output(*texts, doctest.ELLIPSIS)


def _comparable(text: str, command: str = "") -> str:
    if command in MEASURING:
        text = re.sub(r"\d[\d.]*( [kMG]B)?", "1", text)
    for pattern, instead in _MEASURED:
        text = pattern.sub(instead, text)
    return "".join(f"{line.strip()}\n" for line in text.splitlines())


class Reader:
    """A new user with a directory of their own, who does what a page says."""

    def __init__(self, run: Callable[[list[str]], int]) -> None:
        """Args: run: the program's command line, in this process; gives its exit code."""
        self._run, self._code, self._names = run, 0, dict[str, Any]()

    def does(self, example: Example) -> str:
        """Run one example in the current directory; what it prints, and of what fails the reason too."""
        out, err = StringIO(), StringIO()
        if example.source == "echo $?":
            return f"{self._code}\n"
        with redirect_stdout(out), redirect_stderr(err):
            if example.python:
                exec(compile(example.source, "<page>", "exec"), self._names)  # noqa: S102 - our own documentation
                self._code = 0
            elif example.words[0] == PROGRAM and not {*SHELL, *MEASURING}.intersection(example.words):
                self._code = self._run(example.words[1:])
            else:
                self._code = _in_shell(example.source, out, err)
        return (out.getvalue() + (err.getvalue() if self._code else "")).replace(f"{ROOT}{os.sep}", "")


def _in_shell(command: str, out: StringIO, err: StringIO) -> int:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = ["bash", "-c", command]
    done = subprocess.run(shell, capture_output=True, text=True, env={**os.environ, "PATH": path}, check=False)  # noqa: S603 - our own documentation
    out.write(done.stdout)
    err.write(done.stderr)
    return done.returncode


def refreshed(text: str, run: Callable[[list[str]], int]) -> str:
    """A page with what its examples print in the current directory."""
    reader, lines = Reader(run), text.splitlines(keepends=True)
    shift = 0
    for example in examples(text):
        if example.needs:
            continue
        printed = reader.does(example)
        shown, new = (example.shown or "").splitlines(), [line.rstrip() for line in printed.splitlines()]
        if example.shows(printed):  # what is left out stays so, what was measured is measured again
            again = {_comparable(line, example.command): line for line in new}
            new = [again.get(_comparable(line, example.command), line) for line in shown]
        elif example.shown is None:
            raise SystemExit(f"this prints, and no text block follows it:\n{example.source}\n{printed}")
        start, count = example.line + shift, len(shown)
        lines[start : start + count] = [f"{line}\n" for line in new]
        shift += len(new) - count
    return "".join(lines)


def main(pages: list[str]) -> None:
    """Write what pages print into them."""
    from exporter.cli import run

    for page in map(Path, pages):
        text = page.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as directory, chdir(directory):
            settle(Path(directory))
            new = refreshed(text, run)
        page.write_text(new, encoding="utf-8")


def settle(directory: Path) -> None:
    """Put into a directory what pages take for granted: the repository's checkpoint."""
    (directory / "artifacts").mkdir()
    (directory / "artifacts" / "tiny-nemotron").symlink_to(ROOT / "artifacts" / "tiny-nemotron")


if __name__ == "__main__":
    main([str(Path(page).resolve()) for page in sys.argv[1:]])
