from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.cli._process import Terminated, shadowing
from runtime.errors import CheckFailed, UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def selftest_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """The command `selftest` as one whose work ends in an exception."""

    def arrange(error: BaseException) -> None:
        def check(*args: Any, **options: Any) -> None:
            raise error

        monkeypatch.setattr("runtime.golden.selftest", check)

    return arrange


@pytest.mark.parametrize(("error", "code"), [(UserError, 2), (CheckFailed, 1)])
def test_what_the_user_must_act_on_is_one_line_and_an_exit_code(cli, selftest_raises, error, code):
    selftest_raises(error("b/model.onnx is missing;\n  copy the bundle again"))
    outcome = cli("selftest", "b")
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err == "error: b/model.onnx is missing; copy the bundle again\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Terminated()])
def test_an_interruption_ends_with_130(cli, selftest_raises, error):
    selftest_raises(error)
    outcome = cli("selftest", "b")
    assert (outcome.code, outcome.err) == (130, "interrupted\n")


def test_a_process_that_is_told_to_end_removes_its_temporary_directories(cli, monkeypatch):
    places = []

    def check(*args: Any, **options: Any) -> None:
        with tempfile.TemporaryDirectory() as directory:
            places.append(Path(directory))
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("went on")

    monkeypatch.setattr("runtime.golden.selftest", check)
    before = signal.getsignal(signal.SIGTERM)
    assert cli("selftest", "b").code == 130
    assert not places[0].exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_program_started_under_nohup_outlives_its_terminal(cli, monkeypatch):
    monkeypatch.setattr("runtime.golden.selftest", lambda *args, **options: os.kill(os.getpid(), signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(AttributeError):  # it came as far as looking at the result
            cli("selftest", "b")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_disk_that_cannot_be_written_is_named_with_a_remedy(cli, selftest_raises, number):
    selftest_raises(OSError(number, os.strerror(number), "/data/bundle"))
    outcome = cli("selftest", "b")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: /data/bundle: {os.strerror(number)}; ")
    assert outcome.err.count("\n") == 1
    assert "choose another place" in outcome.err


@pytest.mark.parametrize(
    "error", [ValueError("ours"), EOFError("ours"), OSError(errno.EBADF, "ours"), ImportError("ours")]
)
def test_a_bug_of_ours_keeps_its_traceback(cli, selftest_raises, error):
    selftest_raises(error)
    with pytest.raises(type(error), match="ours"):
        cli("selftest", "b")


def test_a_missing_module_that_no_extra_installs_is_a_bug(cli, selftest_raises):
    selftest_raises(ModuleNotFoundError("No module named 'runtime.nothing'", name="runtime.nothing"))
    with pytest.raises(ModuleNotFoundError):
        cli("selftest", "b")


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ("torch", "pip install 'nemotron-export[export,cpu]'"),
        ("onnx_ir._core", "pip install 'nemotron-export[export,cpu]'"),
        ("onnxruntime", "'nemotron-export[gpu]'"),
        ("tokenizers", "pip install nemotron-export"),
    ],
)
def test_a_package_that_is_not_installed_is_named_with_the_command_that_adds_it(cli, selftest_raises, missing, remedy):
    selftest_raises(ModuleNotFoundError(f"No module named {missing!r}", name=missing))
    outcome = cli("selftest", "b")
    assert outcome.code == 2
    assert outcome.err.startswith(f"error: {missing} is not installed; ")
    assert remedy in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["no command is given", "nemotron-export --help"]),
        (["exprot"], ["'exprot'", "Did you mean 'export'?", "nemotron-export --help"]),
        (["export"], ["CHECKPOINT", "nemotron-export export --help"]),
        (["export", ".", "--task", "summarization"], ["'summarization'", "'text-generation'"]),
        (["export", ".", "--target", "openvino"], ["'openvino'", "'onnxruntime'"]),
        (["export", ".", "--precision", "fp4"], ["'fp4'", "'fp32', 'fp16', 'bf16', 'fp8', 'int8', 'int4'"]),
        (["export", ".", "--max-length", "0"], ["--max-length", "x>=1"]),
        (["generate", "b", "-p", "x", "--backend", "cuda"], ["'cuda'", "'auto', 'onnxruntime', 'tensorrt'"]),
        (["generate", "b", "-p", "x", "--temprature", "1"], ["--temprature", "--temperature"]),
    ],
)
def test_a_mistyped_command_line_is_one_line_that_says_what_there_is(cli, arguments, words):
    outcome = cli(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert all(word in outcome.err for word in words)


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    for number in range(3000):  # more output than a pipe holds
        (tmp_path / f"file{number}").touch()
    script = (
        "import sys; from exporter.cli import main; import runtime.golden;"
        "from runtime.golden import SelftestResult; from runtime.measured import Comparison;"
        "row = Comparison(name='x', case='y', metric='z', value=0.0, limit=1.0, passed=True);"
        "runtime.golden.selftest = lambda *a, **o: SelftestResult('cpu', [row] * 20000);"
        "sys.argv = ['n', 'selftest', 'b']; main()"
    )
    command = f'{sys.executable} -c "{script}" | head -c 10; exit ${{PIPESTATUS[0]}}'
    outcome = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (outcome.returncode, outcome.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_no_traceback(process):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", "from exporter.cli import main; main()", "doctor", "--json"]
        outcome = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: standard output: No space left")
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["runtime", "plugins"])
def test_a_stranger_of_the_same_name_is_named_instead_of_run(tmp_path, package):
    stranger = tmp_path / package / "__init__.py"
    stranger.parent.mkdir()
    stranger.write_text("raise SystemExit('the stranger ran')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", "from exporter.cli import main; main()", "doctor"]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith(f"error: {stranger} shadows the {package!r} of nemotron-export")
    assert outcome.stderr.count("\n") == 1


def test_an_installation_that_lacks_a_package_is_told_from_one_that_is_whole(tmp_path):
    assert shadowing() is None
    problem = shadowing(tmp_path)
    assert problem is not None
    assert f"shadows the 'exporter' of nemotron-export in {tmp_path}" in problem
