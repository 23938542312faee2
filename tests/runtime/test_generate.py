"""The loop on a fake session, whose next token is a known function of all the tokens of a row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from fake_session import VOCAB, FakeSession, continuation
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import UserError
from runtime.generate import Event, Generation, Settings
from runtime.sampling import Sampling
from runtime.scheduler import Scheduler
from runtime.tokenizer import Tokenizer


def run(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], session: Any = None, **options: Any) -> Generation:
    session = session or FakeSession()
    scheduler = Scheduler(session, tokenizer, prefill_first=True)
    return Generation(scheduler, prompts, Settings(**({"capacity": session.capacity} | options)))


@settings(deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(3, 300), min_size=1, max_size=9), min_size=1, max_size=4),
    chunk=st.one_of(st.none(), st.integers(1, 10)),
)
def test_each_row_says_what_it_would_say_alone(
    tokenizer: Tokenizer, prompts: list[list[int]], chunk: int | None
) -> None:
    result = run(tokenizer, prompts, max_new_tokens=6, prefill_chunk=chunk).result()
    for prompt, row in zip(prompts, result.sequences, strict=True):
        assert row.token_ids == continuation(prompt, 6)
        assert row.text == tokenizer.decode(row.token_ids)
        assert (row.prompt_tokens, row.finish_reason) == (len(prompt), "length")


def test_rows_end_at_any_eos_and_the_others_go_on(tokenizer: Tokenizer) -> None:
    prompts = [[5], [6, 7], [8, 9, 10], [11]]
    alone = [continuation(prompt, 12) for prompt in prompts]
    eos = frozenset({alone[0][2], alone[2][5]})
    result = run(tokenizer, prompts, max_new_tokens=12, eos_token_ids=eos).result()
    for tokens, row in zip(alone, result.sequences, strict=True):
        end = next((n for n, token in enumerate(tokens) if token in eos), None)
        if end is None:
            assert (row.token_ids, row.finish_reason) == (tokens, "length")
        else:
            assert (row.token_ids, row.finish_reason) == (tokens[: end + 1], "eos")  # the eos included
            assert row.text == tokenizer.decode(tokens[:end])  # but not in the text


def test_without_eos_ids_nothing_ends_a_row_but_its_length(tokenizer: Tokenizer) -> None:
    row = run(tokenizer, [[5]], max_new_tokens=20).result().sequences[0]
    assert (len(row.token_ids), row.finish_reason) == (20, "length")


def test_finished_rows_cost_nothing_once_they_are_last_or_first(tokenizer: Tokenizer) -> None:
    prompts, session = [[5], [6, 7], [8, 9, 10]], FakeSession()
    alone = [continuation(prompt, 8) for prompt in prompts]
    run(tokenizer, prompts, session, max_new_tokens=8, eos_token_ids=frozenset(alone[2][:1])).result()
    assert session.widths[1] == (2, 1)


def test_a_stop_string_ends_the_row_and_no_part_of_it_is_shown(tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(continuation([5, 6], 20))
    stop = text[7:10]
    end = text.index(stop)
    events = list(run(tokenizer, [[5, 6]], max_new_tokens=20, stop=("never", stop)))
    assert "".join(event.text for event in events) == text[:end]
    assert events[-1].finish_reason == "stop"
    assert [event.token_id for event in events] == continuation([5, 6], end + 3)
    assert all(event.finish_reason is None for event in events[:-1])


def test_a_stop_string_that_only_began_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    text = tokenizer.decode(continuation([5, 6], 5))
    row = run(tokenizer, [[5, 6]], max_new_tokens=5, stop=(text[-2:] + "~~",)).result().sequences[0]
    assert (row.text, row.finish_reason) == (text, "length")


def test_a_character_cut_by_the_end_is_shown_as_far_as_it_came(tokenizer: Tokenizer) -> None:
    rocket = tokenizer.encode("日")[1:]
    assert len(rocket) > 1

    class Spells(FakeSession):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            logits = super().step(*args, **kwargs)
            return np.roll(np.eye(1, VOCAB, dtype=np.float32), rocket[0], -1)[None] + 0 * logits

    row = run(tokenizer, [[5]], Spells(), max_new_tokens=1).result().sequences[0]
    assert row.text == tokenizer.decode(rocket[:1]) == "\ufffd"


def test_the_capacity_ends_a_row_after_its_last_place_is_used(tokenizer: Tokenizer) -> None:
    prompts = [[5] * 9, [6] * 12]
    result = run(tokenizer, prompts, FakeSession(capacity=12), max_new_tokens=50).result()
    first, second = result.sequences
    # Twelve places hold the prompt and all new tokens but the last, which nobody needs to read.
    assert (len(first.token_ids), first.finish_reason) == (4, "length")
    assert (len(second.token_ids), second.finish_reason) == (1, "length")
    assert first.token_ids == continuation([5] * 9, 4)


def test_events_come_row_by_row_and_add_up_to_the_result(tokenizer: Tokenizer) -> None:
    generation = run(tokenizer, [[5], [6]], max_new_tokens=3)
    first = next(generation)
    assert isinstance(first, Event)
    events = [first, *generation]
    assert [event.row for event in events] == [0, 1, 0, 1, 0, 1]
    result = generation.result()
    for row in range(2):
        mine = [event for event in events if event.row == row]
        assert [event.token_id for event in mine] == result.sequences[row].token_ids
        assert "".join(event.text for event in mine) == result.sequences[row].text


def test_the_result_is_the_json_that_programs_rely_on(tokenizer: Tokenizer) -> None:
    data = run(tokenizer, [[5, 6]], max_new_tokens=3).result().to_json()
    timing = data.pop("timing")
    tokens = continuation([5, 6], 3)
    assert data == {
        "schema": 1,
        "backend": "fake",
        "sequences": [
            {
                "prompt_tokens": 2,
                "token_ids": tokens,
                "text": tokenizer.decode(tokens),
                "finish_reason": "length",
            }
        ],
    }
    assert set(timing) == {"load_s", "ttft_s", "decode_tokens_per_s"}
    assert timing["decode_tokens_per_s"] > 0
    alone = run(tokenizer, [[5]], max_new_tokens=1).result()
    assert alone.timing.decode_tokens_per_s is None  # no decode step, no speed


def test_a_seeded_row_does_not_depend_on_its_batch_mates(tokenizer: Tokenizer) -> None:
    class Flat(FakeSession):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs) / 9

    sampling = Sampling(temperature=1.0, seed=11)
    alone = run(tokenizer, [[8, 9]], Flat(), max_new_tokens=8, sampling=sampling).result()
    mates = run(tokenizer, [[5], [8, 9], [7] * 6], Flat(), max_new_tokens=8, sampling=sampling).result()
    assert alone.sequences[0] == mates.sequences[1]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[5], []], {}, "prompt 2 is empty"),
        ([[5], [6] * 65], {}, "prompt 2 has 65 tokens, the capacity is 64; shorten it"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens should be at least 1; found 0"),
        ([[5]], {"prefill_chunk": 0}, "prefill_chunk should be at least 1; found 0"),
        ([[5]], {"stop": ("",)}, "a stop string is empty"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_runs(
    tokenizer: Tokenizer, prompts: list[list[int]], options: dict[str, Any], message: str
) -> None:
    session = FakeSession()
    with pytest.raises(UserError, match=message):
        run(tokenizer, prompts, session, **options)
    assert not session.widths
