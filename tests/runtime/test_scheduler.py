"""Requests that come and go on a session whose next token follows from everything in the slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fake_session import VOCAB, FakeSession, continuation
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import CheckFailed, UserError
from runtime.row import Event, Settings
from runtime.sampling import Sampling
from runtime.scheduler import PREFILL_CHUNK, Scheduler
from runtime.tokenizer import Tokenizer

START = list(range(7, 47))  # that many prompts have in common, more than is worth a copy

prompts = st.builds(
    lambda common, rest: START[:common] + rest,
    st.integers(0, len(START)),
    st.lists(st.integers(3, 300), min_size=1, max_size=9),
)


def options(**given: Any) -> Settings:
    return Settings(**({"capacity": 64, "max_new_tokens": 6} | given))


@settings(deadline=None, max_examples=150)
@given(
    requests=st.lists(st.tuples(prompts, st.integers(1, 12), st.booleans()), min_size=1, max_size=12),
    actions=st.lists(st.integers(0, 4), max_size=60),
    slots=st.integers(1, 4),
    exchanges=st.booleans(),
    chunk=st.one_of(st.none(), st.integers(1, 5)),
)
def test_each_request_says_what_it_would_alone_whoever_comes_and_goes(
    tokenizer: Tokenizer, requests: list[Any], actions: list[int], slots: int, exchanges: bool, chunk: int | None
) -> None:
    scheduler = Scheduler(FakeSession(slots, 58, exchanges=exchanges), tokenizer)
    waiting, running, cancelled = list(requests), [], set()
    for action in actions:
        if action == 0 and running:
            victim = running[len(actions) % len(running)][0]
            victim.close()
            cancelled.add(victim.row.number)
        elif action <= 2 and waiting:
            prompt, count, lookup = waiting.pop()
            given = options(capacity=58, max_new_tokens=count, prompt_lookup=lookup, prefill_chunk=chunk)
            running.append((scheduler.submit(prompt, given), prompt, count))
        else:
            scheduler.step()
    scheduler.run()
    assert not scheduler.step()
    for request, prompt, count in running:
        said, expected = [event.token_id for event in request], continuation(prompt, count)
        if request.row.number in cancelled:
            assert said == expected[: len(said)]
        else:
            assert said == expected[: 58 - len(prompt) + 1]
            assert request.row.finish_reason == "length"


def test_more_requests_than_slots_wait_in_order(tokenizer: Tokenizer) -> None:
    scheduler, order = Scheduler(FakeSession(slots=2), tokenizer), []

    def told(event: Event) -> None:
        if event.finish_reason:
            order.append(event.row)

    for token in range(5, 11):
        scheduler.submit([token], options(max_new_tokens=3), told)
    scheduler.run()
    assert order == sorted(order)
    assert len(order) == 6


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([5] * 65, {}, "the prompt has 65 tokens, the capacity is 64"),
        ([5, VOCAB], {}, f"token id {VOCAB} is outside"),
        ([5] * 30, {"capacity": 4096, "max_new_tokens": 36}, "30 tokens and 36 new ones do not fit a slot of 64"),
    ],
)
def test_what_can_never_run_is_refused_at_once(tokenizer: Tokenizer, prompt: list[int], given: Any, message: str):
    session = FakeSession()
    scheduler = Scheduler(session, tokenizer)
    with pytest.raises(UserError, match=message):
        scheduler.submit(prompt, options(**given))
    assert not scheduler.step()
    assert not session.widths


def test_what_just_fits_runs(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(FakeSession(), tokenizer)
    request = scheduler.submit([5] * 30, options(capacity=4096, max_new_tokens=35))
    assert request.result().token_ids == continuation([5] * 30, 35)


def test_a_closed_request_frees_its_slot_for_the_next_step(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(FakeSession(slots=1), tokenizer)
    first, second = (scheduler.submit(prompt, options()) for prompt in ([5], [6]))
    next(first)
    first.close()
    assert next(second).token_id == continuation([6], 1)[0]
    assert list(first) == []
    waiting = scheduler.submit([7], options())
    waiting.close()
    assert list(waiting) == []
    assert second.result().token_ids == continuation([6], 6)


def test_an_exception_in_a_callback_ends_its_own_request_only(tokenizer: Tokenizer) -> None:
    scheduler = Scheduler(FakeSession(), tokenizer)

    def fails(event: Event) -> None:
        raise RuntimeError(f"no more after {event.token_id}")

    bad, good = scheduler.submit([5], options(), fails), scheduler.submit([6], options())
    assert good.result().token_ids == continuation([6], 6)
    assert bad.row.token_ids == continuation([5], 1)
    assert bad.finished
    with pytest.raises(RuntimeError, match="no more after"):
        next(bad)


@pytest.mark.parametrize("when", [1, 3])
def test_a_callback_may_cancel_and_submit(tokenizer: Tokenizer, when: int) -> None:
    scheduler, later = Scheduler(FakeSession(), tokenizer), []

    def first_told(_: Event) -> None:
        if len(first.row.token_ids) == when:
            other.close()
            later.append(scheduler.submit([9], options()))

    first = scheduler.submit([5], options(), first_told)
    other = scheduler.submit([6], options())
    scheduler.run()
    assert first.row.token_ids == continuation([5], 6)
    assert (len(other.row.token_ids), other.row.finish_reason) == (when - 1, None)
    assert later[0].row.token_ids == continuation([9], 6)


def test_logits_that_are_no_number_end_their_request_only(tokenizer: Tokenizer) -> None:
    class Overflows(FakeSession):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            logits = super().step(*args, **kwargs)
            logits[[self.cached[slot, 0] == 5 for slot in args[3]]] = np.nan
            return logits

    scheduler = Scheduler(Overflows(), tokenizer)
    bad, good = scheduler.submit([5], options()), scheduler.submit([6], options())
    assert good.result().token_ids == continuation([6], 6)
    with pytest.raises(CheckFailed, match="not finite"):
        next(bad)


def test_a_long_prompt_lets_running_rows_go_on_between_its_parts(tokenizer: Tokenizer) -> None:
    session = FakeSession(capacity=4 * PREFILL_CHUNK)
    scheduler = Scheduler(session, tokenizer)
    running = scheduler.submit([5], options(capacity=session.capacity, max_new_tokens=100))
    next(running)
    long = scheduler.submit([6] * (3 * PREFILL_CHUNK), options(capacity=session.capacity))
    before = len(running.row.token_ids)
    next(long)
    assert len(running.row.token_ids) - before == 3
    assert max(width for _, width in session.widths) <= PREFILL_CHUNK
    assert running.result().token_ids == continuation([5], 100)
    assert long.result().token_ids == continuation([6] * (3 * PREFILL_CHUNK), 6)


def test_a_prompt_that_begins_like_another_is_not_computed_again(tokenizer: Tokenizer) -> None:
    session = FakeSession(capacity=200)
    scheduler = Scheduler(session, tokenizer)
    common = list(range(5, 105))
    first = scheduler.submit([*common, 200], options(capacity=200, max_new_tokens=50))
    next(first)
    fed = session.fed
    live = scheduler.submit([*common, 201, 202], options(capacity=200, max_new_tokens=1))  # beside it
    assert live.result().token_ids == continuation([*common, 201, 202], 1)
    assert first.result().token_ids == continuation([*common, 200], 50)
    fed = session.fed
    again = [*common, 200, *first.row.token_ids[:20], 250]  # a turn later, in the slot that the first has left
    answer = scheduler.submit(again, options(capacity=200, max_new_tokens=1))
    assert answer.result().token_ids == continuation(again, 1)
    assert session.fed == fed + 1


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("held", [40, 60])  # of 60: the last place of a full slot is needed to carry it along
def test_a_slot_between_running_ones_keeps_what_it_holds(tokenizer: Tokenizer, held: int, exchanges: bool) -> None:
    session = FakeSession(slots=3, capacity=60, exchanges=exchanges)
    scheduler = Scheduler(session, tokenizer)
    middle = [6, *range(20, 40)]
    runs = [([5], 60), (middle, held - len(middle) + 1), ([7], 60)]
    first, between, last = (
        scheduler.submit(prompt, options(capacity=60, max_new_tokens=count)) for prompt, count in runs
    )
    text = [*middle, *between.result().token_ids[:-1]]
    assert len(text) == held
    scheduler.step()
    assert session.widths[-1] == (2 if exchanges else 3, 1)  # the others run on, side by side or this one between them
    fed, again = session.fed, [*text[: held - 1], 299]
    answer = scheduler.submit(again, options(capacity=60, max_new_tokens=1))
    assert answer.result().token_ids == continuation(again, 1)
    assert session.fed - fed <= 1 + 3
    assert first.result().token_ids == continuation([5], 60)
    assert last.result().token_ids == continuation([7], 60)


def test_equal_prompts_at_once_are_computed_once(tokenizer: Tokenizer) -> None:
    session = FakeSession(capacity=200)
    scheduler = Scheduler(session, tokenizer)
    prompt = list(range(5, 105))
    answers = [scheduler.submit(prompt, options(capacity=200, max_new_tokens=1)) for _ in range(3)]
    scheduler.run()
    assert [answer.row.token_ids for answer in answers] == [continuation(prompt, 1)] * 3
    assert session.fed == 100 + 2


def test_short_prompts_share_a_step_and_long_ones_are_not_padded(tokenizer: Tokenizer) -> None:
    session = FakeSession(capacity=300)
    scheduler = Scheduler(session, tokenizer)
    for length in (4, 7, 250):
        scheduler.submit([length] * length, options(capacity=300, max_new_tokens=1))
    scheduler.run()
    assert session.widths == [(2, 7), (1, 250)]


def test_a_seeded_request_does_not_depend_on_who_shares_its_steps(tokenizer: Tokenizer) -> None:
    class Flat(FakeSession):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs) / 9

    sampled = options(sampling=Sampling(temperature=1.0, seed=11), max_new_tokens=20)
    alone = Scheduler(Flat(), tokenizer).submit([8, 9], sampled).result()
    scheduler = Scheduler(Flat(), tokenizer)
    scheduler.submit([5] * 9, options(max_new_tokens=12))
    scheduler.step()
    beside = scheduler.submit([8, 9], sampled)
    scheduler.submit([6], options(max_new_tokens=2))
    assert beside.result() == alone


def test_a_conversation_outlives_a_prompt_that_only_begins_as_all_do(tokenizer: Tokenizer) -> None:
    session = FakeSession(slots=2, capacity=200)
    scheduler = Scheduler(session, tokenizer)
    turn = list(range(1, 101))
    scheduler.submit(turn, options(capacity=200, max_new_tokens=1)).result()
    scheduler.submit([*turn[:40], *range(200, 220)], options(capacity=200, max_new_tokens=1)).result()
    fed = session.fed
    scheduler.submit([*turn, 150], options(capacity=200, max_new_tokens=1)).result()
    assert session.fed == fed + 1


def test_a_prompt_that_ends_between_running_rows_steps_aside(tokenizer: Tokenizer) -> None:
    session = FakeSession(slots=3)
    scheduler = Scheduler(session, tokenizer)
    running = [scheduler.submit([first], options(max_new_tokens=20)) for first in (5, 6, 7)]
    scheduler.step()
    scheduler.cancel(running[1])
    between = scheduler.submit([8, 9], options(max_new_tokens=5))
    scheduler.step()
    assert session.widths[-2:] == [(1, 2), (2, 1)]
    assert between.result().token_ids == continuation([8, 9], 5)
    assert [running[row].result().token_ids for row in (0, 2)] == [continuation([5], 20), continuation([7], 20)]


def test_short_prompts_still_share_a_step_when_slots_hold_their_first_token(tokenizer: Tokenizer) -> None:
    session = FakeSession()
    scheduler = Scheduler(session, tokenizer)
    scheduler.submit([1, 5, 6], options(max_new_tokens=1)).result()
    for prompt in ([1, 7, 8], [1, 9]):
        scheduler.submit(prompt, options(max_new_tokens=1))
    scheduler.run()
    assert session.widths == [(1, 3), (2, 3)]


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_ended_row_of_a_static_batch_costs_no_attention(tokenizer: Tokenizer, exchanges: bool) -> None:
    pasts: list[list[int]] = []

    class Watched(FakeSession):
        def step(self, tokens: Any, lengths: Any, past_lengths: Any, *args: Any, **kwargs: Any) -> Any:
            pasts.append(past_lengths.tolist())
            return super().step(tokens, lengths, past_lengths, *args, **kwargs)

    scheduler = Scheduler(Watched(exchanges=exchanges), tokenizer, prefill_first=True)
    for first, count in ((5, 4), (6, 2), (7, 4)):
        scheduler.submit([first, 8, 9], options(max_new_tokens=count))
    scheduler.run()
    assert pasts == [[0, 0, 0], [3, 3, 3], *([[4, 4], [5, 5]] if exchanges else [[4, 0, 4], [5, 0, 5]])]
