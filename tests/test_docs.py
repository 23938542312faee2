"""The documentation: its examples print what it shows, what cannot run here is of the program, links lead somewhere."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

from exporter.cli import commands, run
from tools.pages import NEEDS, PAGES, PROGRAM, ROOT, SHELL, Reader, examples, inline, same, settle

HERE = {
    "rsync",
    "ssh",
    "docker",
    "pip",
    "python",
    "python3",
    "make",
    "source",
    "git",
    "tritonserver",
    "curl",
}  # of `host`


def named() -> list[list[str]]:
    """Every command of the program that a page shows or names, as words."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shown = [example.words for example in examples(text) if not example.python]
        found += [words for words in (*shown, *inline(text)) if words[:1] == [PROGRAM]]
    return sorted({tuple(_own(words)) for words in found if len(words) > 1})


def _own(words: list[str]) -> list[str]:
    """Without what is the shell's."""
    end = next((i for i, word in enumerate(words) if word in SHELL or word.startswith("2>")), len(words))
    return [word for word in words[:end] if word != "--help"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_what_it_needs(page: Path) -> None:
    for example in examples(page.read_text(encoding="utf-8")):
        assert example.needs in NEEDS
        if example.needs == "host" and not example.python:
            assert example.words[0] in HERE | {PROGRAM}
        if example.needs in {"gpu", "hub"} and not example.python:
            assert example.words[0] == PROGRAM


@pytest.mark.parametrize("words", named(), ids=" ".join)
def test_every_flag_is_one_of_the_program(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    program = commands()
    if words[1:] in [(), ("COMMAND",)]:
        return
    command = program.get_command(click.Context(program), words[1])
    assert command is not None, f"no command {words[1]}"
    if not any(word.startswith(("-", ".", "/")) or word.isupper() for word in words[2:]):
        return  # named in passing, without its arguments
    # A callback of an argument looks at files; here the words alone count.
    for parameter in command.params:
        monkeypatch.setattr(parameter, "callback", None)
    command.make_context(words[1], list(words[2:]), parent=click.Context(program, **program.context_settings))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_module_and_target_that_is_named_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = [example.words for example in examples(text) if not example.python]
    for words in (*shown, *inline(text)):
        if words[:2] in (["python", "-m"], ["python3", "-m"]) and words[2] != "venv":
            assert find_spec(words[2]) is not None, words
        if words[:1] == ["make"] and len(words) > 1:
            assert words[1] in targets, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_pages_and_sections_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path, _, section = target.partition("#")
        there = (page.parent / path) if path else page
        assert there.exists(), target
        if section:
            titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert section in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_print_what_the_page_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path)
    monkeypatch.chdir(tmp_path)
    reader = Reader(run)
    for example in examples(page.read_text(encoding="utf-8")):
        if not example.needs:
            printed = reader.does(example)
            assert example.shows(printed), f"{example.source}\nprints:\n{printed}\nshown:\n{example.shown}"


def test_what_differs_is_seen_and_what_is_measured_is_not_compared() -> None:
    assert same("trace 9.4 s, 16.0 MB\n", "trace  0.1 s, 16.0 MB\n")
    assert same("a\n...\nz\n", "a\nb\nc\nz\n")
    assert same("max 1.2e-06  ok\n", "max 8e-07  ok\n")
    assert not same("max 1.2e-06  ok\n", "max 1.2e-06  FAILED\n")
    assert not same("16.0 MB\n", "17.0 MB\n")
    assert not same("", "something\n")


def test_every_command_has_its_section() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (.+)$", page, re.MULTILINE) == list(commands().commands)


def test_the_containers_commands_are_of_the_program() -> None:
    for page in PAGES:
        for example in examples(page.read_text(encoding="utf-8")):
            words = [] if example.python else example.words
            if words[:2] == ["docker", "run"] and PROGRAM in words:
                rest = words[words.index(PROGRAM) + 1 :]
                assert rest[0] in commands().commands
                assert rest[1] == "/bundle"


def test_the_page_on_triton_names_every_tensor_of_the_model() -> None:
    from exporter.triton.config import INPUTS, OUTPUTS

    text = (ROOT / "docs" / "serve-triton.md").read_text(encoding="utf-8")
    assert not [name for name, _, _ in (*INPUTS, *OUTPUTS) if f"`{name}`" not in text]


def test_the_image_copies_what_the_wheel_is_made_of() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert {"pyproject.toml", "exporter", "runtime", "plugins", "artifacts/tiny-nemotron"} <= names
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in names:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored
