"""A bundle beside peers: those that tests make up, and transformers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runtime
from exporter.bench.peers import Asked, Peer
from exporter.bench.process import Contender

ROOT = Path(__file__).parents[3]
QUICK = ("--rounds", "3", "--new-tokens", "4", "--batch-size", "1")
# Says tokens that no model says; its prompts may have 16 tokens.
PEER = """
import sys, time
from exporter.bench.serve import Unable, serve

class Other:
    packages, weight_bytes, cache_bytes = ("numpy",), 10_000_000, 100
    def prompt(self, state, prompts, capacity):
        if prompts.shape[1] > 16:
            raise Unable("its rows hold 16 tokens")
        if "crash" in sys.argv and capacity > 10:
            raise RuntimeError("it never worked")
        time.sleep(0.05)
        self.rows = len(prompts)
        return [-1] * self.rows
    def step(self, state):
        time.sleep(0.01)
        return [-1] * self.rows

serve(Other)
"""
# Runs the command with that peer among those that are known, and tells the processes it has begun.
HANGING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import exporter.bench.peers as peers
import exporter.bench.run as run
from exporter.bench.process import Contender, Running
script = sys.argv.pop(1)
command = (sys.executable, "-c", script.replace("time.sleep(0.01)", "time.sleep(1000)"))
peers.PEERS["other"] = peers.Peer(("json",), "", lambda asked: Contender("other", "", command))
class Told(Running):
    def __init__(self, contender, log, directory):
        from pathlib import Path
        super().__init__(contender, log, Path.cwd())
        print("begun", self._process.pid, file=sys.__stdout__, flush=True)
run.Running = Told
from exporter.cli import main
main()
"""


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A peer called so; what is added to the list are the arguments of its process."""
    arguments: list[str] = []

    def prepare(asked: Asked) -> Contender:
        return Contender("other", "w8", (sys.executable, "-c", PEER, *arguments))

    monkeypatch.setitem(sys.modules["exporter.bench.peers"].PEERS, "other", Peer(("json",), "", prepare))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return arguments


@pytest.mark.usefixtures("other")
def test_a_peer_stands_beside_the_bundle_case_by_case_with_a_dash_for_what_it_cannot_do(cli, tiny_bundle):
    outcome = cli("bench", tiny_bundle, *QUICK, "--prompt-tokens", "8", "--prompt-tokens", "40", "--against", "other")
    assert outcome.code == 0
    lines = [line.split() for line in outcome.out.splitlines()]
    head = next(number for number, line in enumerate(lines) if line[:2] == ["batch", "prompt"])
    ours, theirs, long, cannot = lines[head + 1 : head + 5]
    assert ours[:4] == ["1", "8", "this", "bundle"]
    assert theirs[:2] == ["other", "w8"]
    assert 0.05 <= float(theirs[2]) < 1
    assert theirs[-2:] == ["0", "%"]  # of its tokens are ours
    assert float(theirs[-4]) > 1  # its first token takes 50 ms
    assert long[:2] == ["1", "40"]
    assert cannot == ["other", "w8", *"-------"]
    assert "other, 1 × 40 tokens: not measured, its rows hold 16 tokens" in outcome.err
    (told,) = (line for line in lines if line[0] == "other" and "loaded" in line)
    assert told[1] == "numpy"


@pytest.mark.usefixtures("other")
def test_the_json_has_the_peers_figures_and_how_far_ours_is_ahead_in_each_round(cli, tiny_bundle):
    outcome = cli("bench", tiny_bundle, *QUICK, "--prompt-tokens", "8", "--against", "other", "--json")
    report = json.loads(outcome.out)
    (peer,), (ours,) = report["peers"], report["speeds"]
    (speed,) = peer["speeds"]
    assert (peer["name"], peer["precision"]) == ("other", "w8")
    assert 5 < peer["peak_rss_mb"] < 200
    assert peer["load_s"] > 0
    assert report["threads"] == len(os.sched_getaffinity(0))
    assert speed["step_bytes"] == 10_000_000 + (8 + 4 // 2) * 100
    assert speed["roofline_share"] == pytest.approx(
        speed["tokens_per_s"]["median"] * speed["step_bytes"] / report["bandwidth_bytes_per_s"]
    )
    ahead = speed["ours"]
    assert ahead["same_tokens"] == 0
    # Three rounds: the greatest ratio is at most that of the extremes, and at least that of the medians' neighbours.
    for name, ratio in (("tokens_per_s", ahead["times_as_fast_decode"]),):
        assert ours[name]["least"] / speed[name]["most"] <= ratio["least"] <= ratio["median"] <= ratio["most"]
        assert ratio["most"] <= ours[name]["most"] / speed[name]["least"]
    assert ahead["times_as_fast_first_token"]["median"] > 1


@pytest.mark.usefixtures("other")
def test_the_picture_has_every_contender_every_case_and_the_roofline(cli, tiny_bundle, tmp_path):
    plot = tmp_path / "speeds.svg"
    lengths = ("--prompt-tokens", "8", "--prompt-tokens", "40")
    outcome = cli("bench", tiny_bundle, *QUICK, *lengths, "--against", "other", "--plot", plot)
    assert outcome.code == 0
    assert f"wrote {plot}" in outcome.err
    for text in ("this bundle", "other w8", "roofline", "1 × 8", "1 × 40", "memory at its peak (MB)", "tiny on "):
        assert text in plot.read_text()


def test_a_bundle_by_itself_has_a_picture_too(cli, tiny_bundle, tmp_path):
    plot = tmp_path / "speeds.png"
    assert cli("bench", tiny_bundle, *QUICK, "--prompt-tokens", "8", "--plot", plot, "--json").code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--plot", "speeds.jpg"), "give a file that ends in .svg or .png"),
        (("--against", "vllm"), "known are transformers, onnxruntime-genai, openvino=DIRECTORY"),
        (("--against", "transformers"), "add --checkpoint DIRECTORY"),
    ],
)
def test_what_cannot_be_measured_or_drawn_is_said_before_the_bundle_is_loaded(
    cli, tiny_bundle, monkeypatch, arguments, told
):
    monkeypatch.setattr("runtime.load", None)
    outcome = cli("bench", tiny_bundle, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert told in outcome.err
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.usefixtures("other")
def test_peers_of_a_bundle_that_runs_elsewhere_are_refused(cli, tiny_bundle, monkeypatch):
    model = runtime.load(tiny_bundle)
    model.backend = "onnxruntime-cuda"
    monkeypatch.setattr("runtime.load", lambda *_, **__: model)
    outcome = cli("bench", tiny_bundle, *QUICK, "--against", "other")
    assert outcome.code == 2
    assert "on onnxruntime-cuda; add --backend onnxruntime --device cpu, or drop --against" in outcome.err


def test_a_peer_that_breaks_down_is_named_with_its_last_words(cli, tiny_bundle, other):
    other.append("crash")
    outcome = cli("bench", tiny_bundle, *QUICK, "--prompt-tokens", "8", "--against", "other")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1] == (
        "error: other w8 has ended with exit code 1: RuntimeError: it never worked; mend that, or leave it out of "
        "--against"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_peers_too(tiny_bundle, number):
    command = [sys.executable, "-c", HANGING, PEER, "bench", str(tiny_bundle), *QUICK, "--against", "other"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    word, peer = process.stdout.readline().split()
    assert word == "begun"
    time.sleep(1)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.endswith("interrupted\n")
    assert "Traceback" not in said
    assert not Path(f"/proc/{peer}").exists()


@pytest.mark.slow
def test_transformers_says_what_the_bundle_says(cli, tiny_bundle, tiny_checkpoint):
    against = ("--against", "transformers", "--checkpoint", tiny_checkpoint)
    cases = ("--rounds", "1", "--new-tokens", "12", "--prompt-tokens", "20", "--batch-size", "2")
    report = json.loads(cli("bench", tiny_bundle, *cases, *against, "--json").out)
    (peer,), (ours,) = report["peers"], report["speeds"]
    (speed,) = peer["speeds"]
    assert speed["ours"]["same_tokens"] == 1.0
    assert speed["step_bytes"] == pytest.approx(ours["step_bytes"], rel=1e-3)  # by its own parameters
    assert set(peer["versions"]) == {"transformers", "torch"}
    assert peer["peak_rss_mb"] > 200  # torch
