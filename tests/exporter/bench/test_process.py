"""A contender's process: what it answers, that it stands still between its turns, and that nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from exporter.bench.process import Contender, Ended, Running, driver_command, memory_of
from exporter.bench.serve import Unable
from runtime.errors import UserError

ROOT = Path(__file__).parents[3]
# Its tokens are those of the prompt and how many were asked for.
COUNTING = """
import os, sys
from exporter.bench.serve import Unable, serve

class Counting:
    packages, weight_bytes, cache_bytes = ("numpy", "no-such-package"), 1000, None
    def __init__(self):
        print("a library says hello")
        self.states = {}
    def prompt(self, state, prompts, capacity):
        if capacity > 1000:
            raise Unable("too long a text")
        if state == "crash":
            print("half a thought\\nout of ideas", file=sys.stderr)
            os._exit(3)
        if state == "killed":
            os.kill(os.getpid(), 9)
        self.states[state] = prompts.sum(1) + capacity
        return self.states[state].tolist()
    def step(self, state):
        self.states[state] = self.states[state] + 1
        return self.states[state].tolist()

serve(Counting)
"""


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "a directory" / "prompts.bin"
    path.parent.mkdir()
    np.arange(6, dtype=np.int32).tofile(path)
    return path


def started(tmp_path: Path, script: str = COUNTING) -> Running:
    return Running(Contender("peer", "int4", (sys.executable, "-c", script)), tmp_path / "log", ROOT)


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_it_answers_whatever_libraries_print_and_is_stopped_between_its_turns(tmp_path: Path, prompts: Path) -> None:
    running = started(tmp_path)
    try:
        assert state(running._process.pid) == "T"
        with running.awake():
            assert running.prompt("a", prompts, 2, 3, 100)[1] == [103, 112]
            assert running.prompt("b", prompts, 1, 2, 0)[1] == [1]
            seconds, tokens = running.decode("a", 2)
        assert tokens == [[104, 113], [105, 114]]
        assert 0 < seconds < 1
        assert state(running._process.pid) == "T"
        assert 0 < running.memory()["resident"] <= running.memory()["peak"]
    finally:
        running.close()
    assert "a library says hello" in (tmp_path / "log").read_text()


def test_what_a_driver_knows_of_its_model_is_told(tmp_path: Path) -> None:
    contender = Contender("peer", "", (sys.executable, "-c", COUNTING), 7, 10, {"mine": "1"})
    running = Running(contender, tmp_path / "log", ROOT)
    running.close()
    assert running.name == "peer"
    assert running.contender.versions == {"mine": "1", "numpy": np.__version__}
    assert running.contender.step_bytes(rows=8, context=100) == 1000 + 8 * 100 * 10
    assert Contender("peer", "", ()).step_bytes(1, 1) is None


def test_what_it_cannot_do_has_a_reason_and_it_goes_on(tmp_path: Path, prompts: Path) -> None:
    running = started(tmp_path)
    try:
        with pytest.raises(Unable, match="too long a text"), running.awake():
            running.prompt("a", prompts, 1, 3, 1001)
        assert state(running._process.pid) == "T"
        with running.awake():
            assert running.prompt("a", prompts, 1, 3, 0)[1] == [3]
    finally:
        running.close()


@pytest.mark.parametrize(
    ("name", "told"),
    [("crash", "peer int4 has ended with exit code 3: out of ideas"), ("killed", "peer int4 has ended by SIGKILL: a ")],
)
def test_one_that_ends_is_named_with_the_last_line_of_what_it_said(
    tmp_path: Path, prompts: Path, name: str, told: str
) -> None:
    running = started(tmp_path)
    with pytest.raises(Ended, match=told), running.awake():
        running.prompt(name, prompts, 1, 3, 0)
    assert not Path(f"/proc/{running._process.pid}").exists()
    running.close()


def test_one_that_is_killed_between_its_turns_is_named_too(tmp_path: Path, prompts: Path) -> None:
    running = started(tmp_path)
    os.kill(running._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, running._process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(Ended, match="peer int4 has ended by SIGKILL"), running.awake():
        running.prompt("a", prompts, 1, 3, 0)


def test_one_that_does_not_load_is_named_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(Ended, match="peer int4 has ended with exit code 1: no such model"):
        started(tmp_path, "raise SystemExit('no such model')")


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"peer cannot be started: .*no-such-program"):
        Running(Contender("peer", "", ("/no-such-program",)), tmp_path / "log", tmp_path)


def test_it_does_not_outlive_a_parent_that_is_killed_though_it_is_stopped(tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from exporter.bench.process import Contender, Running
peer = Contender("peer", "", (sys.executable, "-c", {COUNTING!r}))
running = Running(peer, Path({str(tmp_path / "log")!r}), Path.cwd())
print(running._process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert state(child) == "T"
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and Path(f"/proc/{child}").exists() and state(child) != "Z":
        time.sleep(0.05)
    gone = not Path(f"/proc/{child}").exists() or state(child) == "Z"
    if not gone:
        os.kill(child, signal.SIGKILL)
    assert gone


def test_a_driver_finds_the_protocol_wherever_it_is_started_and_imports_what_its_python_has(tmp_path: Path) -> None:
    (tmp_path / "exporter").mkdir()  # which is not ours
    genai = Contender("genai", "", driver_command(sys.executable, "genai", "/nowhere", 1))
    with pytest.raises(Ended, match="No module named 'onnxruntime_genai'"):
        Running(genai, tmp_path / "log", tmp_path)


def test_memory_is_of_the_process_and_counts_what_it_holds() -> None:
    before = memory_of("self")
    held = np.ones(32 << 20, np.uint8)
    after = memory_of("self")
    assert after["peak"] >= before["resident"] + held.nbytes - (4 << 20)
