"""The walk-throughs' commands: those that need no GPU run, as they stand; of the others the flags are parsed."""

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
TENSORRT, TRITON = "deploy-tensorrt.md", "serve-triton.md"
KINDS = {TENSORRT: {"", "gpu", "rtx", "host"}, TRITON: {"", "host"}}  # of each guide's blocks: what they need


def blocks(guide: str) -> Iterator[tuple[str, list[str]]]:
    """Each console block: what it needs, and its commands; a line that ends in a backslash goes on."""
    text = (ROOT / "docs" / guide).read_text().replace("\\\n", "")
    for kind, body in re.findall(r"^```console ?(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        yield kind, [line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ ")]


def arguments(guide: str, kinds: set[str]) -> list[list[str]]:
    return [shlex.split(command) for kind, lines in blocks(guide) if kind in kinds for command in lines]


@pytest.mark.parametrize("guide", KINDS)
def test_every_block_says_what_it_needs(guide: str) -> None:
    found = list(blocks(guide))
    assert {kind for kind, _ in found} == KINDS[guide]
    assert all(lines for _, lines in found)
    assert all(words[0] == "nemotron-export" for words in arguments(guide, KINDS[guide] - {"host"}))


@pytest.mark.parametrize(
    "words", [words for guide, kinds in KINDS.items() for words in arguments(guide, kinds - {"host"})], ids=" ".join
)
def test_every_flag_is_one_of_the_program(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = commands()
    command = program.get_command(click.Context(program), words[1])
    assert command is not None, f"no command {words[1]}"
    # A callback of an argument looks at files; here the words alone count.
    for parameter in command.params:
        monkeypatch.setattr(parameter, "callback", None)
    command.make_context(words[1], words[2:])


def test_the_containers_commands_are_of_the_program() -> None:
    for words in arguments(TENSORRT, {"host"}):
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


def test_the_guide_to_triton_names_every_tensor_of_the_model() -> None:
    from exporter.triton.config import INPUTS, OUTPUTS

    text = (ROOT / "docs" / TRITON).read_text()
    assert not [name for name, _, _ in (*INPUTS, *OUTPUTS) if f"`{name}`" not in text]


@pytest.mark.slow
def test_the_commands_up_to_the_server_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "artifacts").symlink_to(ROOT / "artifacts")
    monkeypatch.chdir(tmp_path)
    assert [run(words[1:]) for words in arguments(TRITON, {""})] == [0, 0]
    assert Path("models/assistant/config.pbtxt").is_file()


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
    for words in arguments(TENSORRT, kinds):
        code = run(words[1:])
        out, err = capsys.readouterr()
        assert code == 0, f"{shlex.join(words)}: {err}"
        printed.append(out)
    assert any("planets" in out for out in printed)
    assert os.path.exists("bundle/manifest.json")
    if "rtx" in kinds:
        assert list(Path("bundle/engines").glob("tensorrt-rtx-*-sm89/model.plan"))
