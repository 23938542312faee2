"""Drafts from what a row says already: the same text in fewer steps, and none where they do not pay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_session import FakeSession, next_token
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.lookup import LONGEST, MOST, PATIENCE, SHORTEST, Lookup, Pace
from runtime.row import Settings
from runtime.sampling import Sampling
from runtime.scheduler import Scheduler
from runtime.tokenizer import Tokenizer


def by_search(tokens: Sequence[int], most: int) -> list[int]:
    """What should be drafted, by looking through all of it."""
    for width in range(LONGEST, SHORTEST - 1, -1):
        for start in range(len(tokens) - width - 1, -1, -1):
            if width <= len(tokens) and list(tokens[start : start + width]) == list(tokens[-width:]):
                return list(tokens[start + width : start + width + most])
    return []


@given(tokens=st.lists(st.integers(0, 3), max_size=40), cut=st.integers(0, 40), most=st.integers(0, 9))
def test_a_draft_is_what_followed_the_last_tokens_where_they_stood_last(tokens, cut, most) -> None:
    lookup = Lookup(tokens[:cut])
    lookup.extend(tokens[cut:])
    assert lookup.draft(most) == by_search(tokens, most)[:most]


class Repeats(FakeSession):
    """Goes round in a circle of nine tokens, but for a slip now and then; a step takes no time to speak of."""

    def next_token(self, tokens: Sequence[int]) -> int:
        return next_token(tokens) if len(tokens) % 23 == 0 else 40 + len(tokens) % 9


def generate(session: FakeSession, tokenizer: Tokenizer, *, lookup: bool, **given: Any) -> Any:
    options = {"capacity": session.capacity, "max_new_tokens": 150, "prompt_lookup": lookup} | given
    return Scheduler(session, tokenizer).submit([5, 6, 7], Settings(**options)).result()


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes a second, whatever its width."""
    ticks = iter(range(10**9))
    monkeypatch.setattr("runtime.scheduler.time.perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("steady")
def test_text_that_repeats_takes_half_the_steps_and_is_the_same(tokenizer: Tokenizer) -> None:
    plain, drafting = Repeats(capacity=200), Repeats(capacity=200)
    expected = generate(plain, tokenizer, lookup=False)
    assert generate(drafting, tokenizer, lookup=True) == expected
    assert len(expected.token_ids) == 150
    assert len(drafting.widths) < len(plain.widths) / 2


@pytest.mark.usefixtures("steady")
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_sampled_text_is_the_same_with_drafts(tokenizer: Tokenizer, seed: int, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, seed=seed, repetition_penalty=1.1)
    texts = [generate(Repeats(capacity=200), tokenizer, lookup=on, sampling=sampling) for on in (False, True)]
    assert texts[0] == texts[1]


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("capacity", range(20, 40))
def test_a_row_ends_where_it_would_without_drafts(tokenizer: Tokenizer, capacity: int) -> None:
    for own in ({}, {"max_new_tokens": capacity - 9}, {"eos_token_ids": frozenset({47})}, {"stop": ("a",)}):
        texts = [generate(Repeats(capacity=capacity), tokenizer, lookup=on, **own) for on in (False, True)]
        assert texts[0] == texts[1]


def test_drafts_grow_while_they_hold_and_rest_when_they_cost_more_than_they_give() -> None:
    pace = Pace()
    assert pace.most == 0  # nothing is known of a step yet
    pace.single(1.0)
    assert pace.most == 4
    pace.drafted(4, 4, 2.0)
    pace.drafted(8, 8, 2.0)
    assert pace.most == MOST
    pace.drafted(MOST, 6, 2.0)
    assert pace.most == (MOST + 6) // 2
    pace.drafted(MOST, MOST, 2.0)
    pace.drafted(MOST, MOST, 2.0)
    assert pace.most == MOST
    for patience in (PATIENCE, 2 * PATIENCE):
        pace.drafted(MOST, 0, 3.0)
        for _ in range(patience):
            assert pace.most == 0
            pace.single(1.0)
        assert pace.most > 0
    pace.drafted(2, 1, 1.5)  # two tokens in the time of one and a half: not a loss
    assert pace.most > 0


def test_no_draft_is_made_while_others_run(tokenizer: Tokenizer) -> None:
    session = Repeats(capacity=200)
    scheduler = Scheduler(session, tokenizer)
    for first in (5, 6):
        scheduler.submit([first, 7, 8], Settings(capacity=200, max_new_tokens=60, prompt_lookup=True))
    scheduler.run()
    assert {width for rows, width in session.widths[1:] if rows == 2} == {1}


def test_logits_of_a_draft_are_those_of_single_steps(session: Any) -> None:
    """On the real backend: what a draft's positions give is what steps of one token give."""
    prompt, draft = [1, 40, 50, 60], [33, 44, 55]
    one, none = np.array([1]), np.array([0])
    session.step(np.array([prompt]), np.array([4]), none, np.array([0]))
    session.step(np.array([prompt]), np.array([4]), none, np.array([1]))
    at_once = session.step(np.array([draft]), np.array([3]), np.array([4]), np.array([0]), keep=3)[0]
    for index, token in enumerate(draft):
        alone = session.step(np.array([[token]]), one, np.array([4 + index]), np.array([1]))[0, 0]
        np.testing.assert_allclose(at_once[index], alone, atol=1e-4)
