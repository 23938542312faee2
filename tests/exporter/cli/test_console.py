"""How far a long export is, on a terminal and in a log."""

from __future__ import annotations

import sys

import pytest

from exporter.cli import _console
from exporter.cli._console import describe_progress, duration, stages


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_console.time, "perf_counter", clock)
    return clock


def test_bytes_have_a_speed_and_every_count_a_time_left():
    assert describe_progress("weights", 500_000_000, 2_000_000_000, 5.0) == "500.0 MB of 2.0 GB, 100.0 MB/s, 15 s left"
    assert describe_progress("weights", 2_000_000_000, 2_000_000_000, 20.0) == "2.0 GB of 2.0 GB, 100.0 MB/s"
    assert describe_progress("calibration", 8, 32, 200.0) == "10 min left"
    assert describe_progress("verify", 0, 34, 1.0) == ""


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0 s"), (99, "99 s"), (600, "10 min"), (9000, "2.5 h")])
def test_times_are_told_as_people_read_them(seconds, told):
    assert duration(seconds) == told


def test_a_log_hears_of_a_long_stage_at_most_every_ten_seconds(clock, capsys):
    with stages() as progress:
        progress("weights", 0, 1)
        for second in range(1, 26):
            clock.now += 1
            progress("weights", second * 10**8, 5 * 10**9)
        progress("weights", 1, 1)
        progress("verify", 0, 1)
        clock.now += 3
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "weights     20 %  1.0 GB of 5.0 GB, 100.0 MB/s, 40 s left",
        "weights     40 %  2.0 GB of 5.0 GB, 100.0 MB/s, 30 s left",
        "weights    25.0 s",
        "verify      3.0 s",
    ]


def test_a_terminal_shows_bytes_and_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with stages() as progress:
        progress("trace", 0, 1)
        progress("trace", 1, 1)
        progress("weights", 0, 1)
        progress("weights", 10**9, 4 * 10**9)
    shown = capsys.readouterr().err
    assert "1.0 GB of 4.0 GB" in shown
    assert "/s, " in shown
    assert " left" in shown
