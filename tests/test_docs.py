"""The walk-through's commands: those that need no GPU run, as they stand; of the others the flags are parsed."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from exporter.cli import commands, run

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "deploy-tensorrt.md"
KINDS = {"", "gpu", "rtx", "host"}


def blocks() -> Iterator[tuple[str, list[str]]]:
    """Each console block: what it needs, and its commands."""
    for kind, body in re.findall(r"^```console ?(\w*)\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL):
        yield kind, [line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ ")]


def arguments(kinds: set[str]) -> list[list[str]]:
    return [shlex.split(command) for kind, lines in blocks() if kind in kinds for command in lines]


def test_every_block_says_what_it_needs() -> None:
    found = list(blocks())
    assert {kind for kind, _ in found} == KINDS
    assert all(lines for _, lines in found)
    assert all(words[0] == "nemotron-export" for words in arguments(KINDS - {"host"}))


@pytest.mark.parametrize("words", arguments(KINDS - {"host"}), ids=" ".join)
def test_every_flag_is_one_of_the_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = commands()
    command = program.get_command(click.Context(program), words[1])
    assert command is not None, f"no command {words[1]}"
    # A callback of an argument looks at files; here the words alone count.
    for parameter in command.params:
        monkeypatch.setattr(parameter, "callback", None)
    command.make_context(words[1], words[2:])


def test_the_containers_commands_are_of_the_program() -> None:
    for words in arguments({"host"}):
        if words[:2] == ["docker", "run"]:
            rest = words[words.index("nemotron-export") + 1 :]
            assert rest[0] in commands().commands
            assert rest[1] == "/bundle"


def test_the_image_copies_what_the_wheel_is_made_of() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in copied for name in line.split()}
    assert {"pyproject.toml", "exporter", "runtime", "plugins", "artifacts/tiny-nemotron"} <= names
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name in names:
        assert (ROOT / name).exists()
        assert f"!{name}" in ignored


@pytest.mark.slow
def test_what_needs_no_gpu_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "artifacts").symlink_to(ROOT / "artifacts")
    monkeypatch.chdir(tmp_path)
    kinds = {""}
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        print("not run: the block that builds with tensorrt-rtx, which is not installed")
    else:
        kinds.add("rtx")
    printed = []
    for words in arguments(kinds):
        code = run(words[1:])
        out, err = capsys.readouterr()
        assert code == 0, f"{shlex.join(words)}: {err}"
        printed.append(out)
    assert any("planets" in out for out in printed)
    assert os.path.exists("bundle/manifest.json")
    if "rtx" in kinds:
        assert list(Path("bundle/engines").glob("tensorrt-rtx-*-sm89/model.plan"))
