"""Scores do not depend on how texts are cut, batched and put into slots; their logits stay within memory."""

from __future__ import annotations

import numpy as np
import pytest
from fake_session import VOCAB, FakeSession, next_token

from exporter.harness import scoring
from exporter.harness.paths import Query
from exporter.harness.scoring import Tokens, score
from runtime.errors import CheckFailed

LIKELY = -float(np.log(1 + (VOCAB - 1) * np.exp(-9.0)))  # of what the fake session says next
UNLIKELY = LIKELY - 9


class Session(FakeSession):
    """Runs several rows behind a past, as engines do, and notes how many logits a step gave."""

    most = 0

    def step(self, tokens, lengths, past_lengths, slots=None, keep=1):
        type(self).most = max(self.most, len(tokens) * keep)
        rows = [
            super(Session, self).step(
                tokens[n : n + 1], lengths[n : n + 1], past_lengths[n : n + 1], slots[n : n + 1], keep
            )
            for n in range(len(tokens))
        ]
        return np.concatenate(rows)


def queries(count: int, length: int) -> list[Query]:
    """Continuations of three tokens that the session would say, but for every third's last."""
    made = []
    for number in range(count):
        tokens = [3 + number // 4, *range(4, 4 + length + number)]
        targets = []
        for _ in range(3):
            targets.append(next_token(tokens))
            tokens.append(targets[-1])
        if number % 3 == 2:
            targets[-1] = 1
        made.append(Query(tokens[:-1], targets))
    return made


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("width", [1, 5, 256])
def test_every_continuation_is_worth_what_the_model_says(rows, width, monkeypatch):
    monkeypatch.setattr(scoring, "WIDTH", width)
    asked, counted = queries(20, 11), Tokens()
    scores = score(Session, asked, rows, counted)
    for number, found in enumerate(scores):
        assert found.logprob == pytest.approx(3 * LIKELY if number % 3 != 2 else 2 * LIKELY + UNLIKELY, rel=1e-6)
        assert found.greedy == (number % 3 != 2)
    assert counted.asked == sum(len(query.tokens) for query in asked)
    assert counted.computed <= counted.asked


def test_nothing_asked_gives_nothing():
    assert score(Session, [], 8, Tokens()) == []


def test_the_logits_of_a_step_are_bounded(monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * VOCAB * 20)
    monkeypatch.setattr(scoring, "WIDTH", 16)
    monkeypatch.setattr(Session, "most", 0)
    whole = [Query([first, *range(10, 50)], [5] * 41) for first in range(60, 70)]
    score(Session, whole, 10, Tokens())
    assert 16 <= Session.most <= 20


def test_logits_that_are_no_numbers_are_not_scored():
    class Broken(Session):
        def step(self, *args, **kwargs):
            return super().step(*args, **kwargs) * np.nan

    with pytest.raises(CheckFailed, match="not finite"):
        score(Broken, [Query([1], [2])], 1, Tokens())
