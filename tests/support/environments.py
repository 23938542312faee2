"""Virtual environments for tests of other projects' runtimes, and of our own without torch. Made once, then found."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".venvs"


class Failed(AssertionError):
    """A command failed; with what it said."""


def environment(
    name: str,
    requirements: Sequence[str],
    constraints: Path | None = ROOT / "constraints.txt",
    place: Path = PLACE,
) -> Path:
    """The directory of executables of a virtual environment in `place` that has these requirements, none of ours.

    Versions are those of `constraints`, of PyPI's newest where there are none. A requirement that is a path is
    installed without looking at its name alone: its content counts for the cache.
    """
    key = hashlib.sha256("\n".join([sys.version, *map(_content, requirements)]).encode()).hexdigest()[:12]
    directory = place / f"{name}-{key}"
    if not (directory / "complete").is_file():
        shutil.rmtree(directory, ignore_errors=True)
        run([sys.executable, "-m", "venv", directory])
        held = ["-c", constraints] if constraints is not None else []
        run([directory / "bin" / "pip", "install", "-q", *held, *requirements])
        (directory / "complete").touch()
    return directory / "bin"


def run(command: Sequence[str | Path], **options: object) -> str:
    """Run a command outside the repository and return its stdout; its stderr is shown where it fails."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd="/", check=False, env=env, **options
    )
    if done.returncode:
        raise Failed(f"{command}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def _content(requirement: str) -> str:
    path = Path(requirement.partition("[")[0])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else requirement
