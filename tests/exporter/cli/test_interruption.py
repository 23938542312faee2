"""A real process that is interrupted, or whose disk is full, leaves nothing behind whatever it is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exporter.cli._process import Terminated, interrupt_on_termination

ROOT = Path(__file__).parents[3]

# Runs the command line, and sends the signal a moment after the stage's own function has begun. What a shell runs in
# the background, these tests for one, has its children ignore an interruption.
_INTERRUPTED = """
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
import exporter.export as module
name, delay, number = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
del sys.argv[1:4]
original = getattr(module, name)
def begun(*arguments, **options):
    threading.Timer(delay, os.kill, (os.getpid(), number)).start()
    return original(*arguments, **options)
setattr(module, name, begun)
from exporter.cli import main
main()
"""
_LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from exporter.cli import main
main()
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False, env=environment)


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_interruption_that_a_destructor_swallows_comes_back(number, raised):
    class Dropped:
        def __del__(self):
            signal.raise_signal(number)

    def work():
        Dropped()
        until = time.monotonic() + 10
        while time.monotonic() < until:
            time.sleep(0.01)

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {which: signal.signal(which, handler) for which, handler in usual.items()}  # other tests may have theirs
    try:
        with pytest.raises(KeyboardInterrupt) as caught, interrupt_on_termination():
            work()
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
    assert caught.type is raised


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "delay", "number"),
    [
        ("trace", 1.5, signal.SIGINT),
        ("write_weights", 0.01, signal.SIGINT),
        ("gate", 0.0, signal.SIGINT),
        ("gate", 0.1, signal.SIGTERM),
    ],
)
def test_an_interrupted_export_ends_with_130_and_leaves_nothing(stage, delay, number, tiny_checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    bundle = tmp_path / "mine" / "a" / "b" / "bundle"
    outcome = run(_INTERRUPTED, stage, delay, int(number), "export", tiny_checkpoint, bundle)
    assert outcome.returncode == 130
    assert outcome.stdout == ""
    assert "Traceback" not in outcome.stderr
    assert outcome.stderr.endswith("interrupted\n")
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_fills_up_while_weights_are_written_is_one_line_and_leaves_nothing(tiny_checkpoint, tmp_path):
    (tmp_path / "mine").mkdir()
    bundle = tmp_path / "mine" / "a" / "bundle"
    outcome = run(_LIMITED, 4_000_000, "export", tiny_checkpoint, bundle)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    told = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert told == [f"error: cannot write {bundle}: File too large; free space there, or choose another place"]
    assert "Traceback" not in outcome.stderr
    assert list((tmp_path / "mine").iterdir()) == []
