"""Whose turn it is, what counts, and what is made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from exporter.bench.measure import Case, Prompts, Taken, measure
from exporter.bench.report import Ahead, Spread, speeds
from exporter.bench.rounds import in_turn, leading
from exporter.bench.serve import Unable
from runtime.bundle import Bundle

CASES = (Case(1, 5), Case(3, 20))


@dataclass
class Fake:
    """Seconds are what it is told; it writes down what it was asked for, and by whom it was preceded."""

    name: str
    log: list[tuple[str, int, int]]
    seconds: list[float] = field(default_factory=lambda: [1.0])
    most: int = 1000
    up: bool = False
    seen: list[bytes] = field(default_factory=list)

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.up = True
        yield
        self.up = False

    def prompt(self, state: str, file: Path, rows: int, length: int, capacity: int) -> tuple[float, list[int]]:
        assert self.up
        if capacity > self.most:
            raise Unable(f"{capacity} are too many")
        if capacity > length + 2:  # else it is what wakes it up
            self.log.append((self.name, rows, length))
            self.seen.append(file.read_bytes())
        self.rows = rows
        return self.seconds[min(len(self.seen), len(self.seconds)) - 1], [0] * rows

    def decode(self, state: str, steps: int) -> tuple[float, list[list[int]]]:
        return 2.0, [[step] * self.rows for step in range(steps)]

    def memory(self) -> dict[str, int]:
        return {"resident": 1, "peak": 100 * len(self.log)}


@pytest.fixture
def prompts(tiny_bundle: Path, tmp_path: Path) -> Prompts:
    return Prompts(Bundle.open(tiny_bundle), tmp_path)


def test_in_every_round_each_runs_each_case_once_on_the_same_tokens_and_another_begins(prompts: Prompts) -> None:
    log: list[tuple[str, int, int]] = []
    fakes = [Fake(name, log) for name in "abc"]
    done: list[tuple[int, int]] = []
    measure(fakes, CASES, prompts, new_tokens=4, rounds=2, reads_memory=False, progress=lambda *now: done.append(now))
    order = ["abc", "abc", "bca", "bca", "cab", "cab"]
    shapes = [(1, 5), (3, 20)] * 3
    assert log == [(name, *shape) for names, shape in zip(order, shapes, strict=True) for name in names]
    assert fakes[0].seen == fakes[1].seen == fakes[2].seen
    assert len(set(fakes[0].seen)) == 6  # nothing that was computed in one round is there in the next
    assert done == [(number, 18) for number in range(1, 19)]


def test_a_round_ahead_of_the_others_is_not_counted_but_for_the_first_start_and_memory(prompts: Prompts) -> None:
    fake = Fake("a", [], seconds=[50.0, 40.0, 0.1, 0.2, 0.3, 0.4])
    measured = measure([fake], CASES, prompts, new_tokens=5, rounds=2, reads_memory=False)
    taken = measured.taken["a"]
    assert taken[CASES[0]].first_token_s == [0.1, 0.3]
    assert taken[CASES[1]].first_token_s == [0.2, 0.4]
    assert taken[CASES[1]].tokens_per_s == [3 * 4 / 2.0] * 2
    assert taken[CASES[1]].tokens == [[[0, 0, 1, 2, 3]] * 3] * 2
    assert measured.cold_s == 50.0
    assert measured.peak_bytes == {"a": 200}
    assert measured.bandwidth is None


def test_a_case_that_is_beyond_one_has_a_reason_and_the_others_go_on(prompts: Prompts) -> None:
    fakes = [Fake("ours", []), Fake("peer", [], most=10)]
    measured = measure(fakes, CASES, prompts, new_tokens=4, rounds=3, reads_memory=False)
    short, long = speeds(measured, "peer", 4, lambda *_: None, measured.taken["ours"])
    assert short.unable is None
    assert short.ahead is not None
    assert long.unable == "23 are too many"
    assert (long.first_token_s, long.tokens_per_s, long.ahead, long.share) == (None, None, None, None)
    told = json.loads(json.dumps(long.to_peer_json()))
    assert (told["tokens_per_s"], told["ours"], told["unable"]) == (None, None, "23 are too many")


def test_ratios_are_of_the_two_turns_of_a_round_and_not_of_medians() -> None:
    ours = Taken([1.0, 2.0, 4.0], [10.0, 20.0, 40.0], [[[1, 2, 3, 4]]] * 3)
    theirs = Taken([4.0, 2.0, 2.0], [5.0, 40.0, 10.0], [[[1, 2, 3, 4]], [[1, 2, 9, 4]], [[9, 2, 3, 4]]])
    ahead = Ahead.of(ours, theirs)
    assert ahead == Ahead(Spread(1.0, 0.5, 4.0), Spread(2.0, 0.5, 4.0), pytest.approx((1 + 0.5 + 0) / 3))
    assert Ahead.of(ours, Taken(unable="why")) is None


def test_prompts_hold_no_token_that_fills_a_row_up_or_ends_it(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    ids = np.fromfile(Prompts(bundle, tmp_path).file(0, Case(64, 500)), np.int32)
    assert len(set(ids.tolist())) > 2000
    assert ids.max() < bundle.vocab_size
    assert not {bundle.config["bos_token_id"], bundle.config["pad_token_id"], *bundle.eos_token_ids} & set(ids.tolist())


def test_who_began_goes_last_in_the_next_round() -> None:
    assert [in_turn("abc", number) for number in range(4)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert in_turn(["a"], 7) == ["a"]


def test_agreement_is_the_share_of_tokens_before_the_first_that_differs() -> None:
    assert leading([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert leading([1, 2], [1, 2]) == 1.0
    assert leading([7, 2], [1, 2]) == 0.0
    with pytest.raises(ValueError, match="longer"):
        leading([1], [1, 2])
