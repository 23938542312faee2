"""What queries have in common is found: nothing is computed twice, nothing that is asked for is lost."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from exporter.harness.paths import Query, chains, lay_out

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6)  # few tokens: much in common
QUERIES = st.lists(st.tuples(TOKENS, TOKENS).map(lambda pair: Query(pair[0], pair[1][: len(pair[0])])), max_size=12)


@given(QUERIES)
def test_every_beginning_is_computed_once_and_every_target_wanted_once(queries):
    paths = lay_out(queries)
    computed = [tuple(path.tokens[:end]) for path in paths for end in range(path.common + 1, len(path.tokens) + 1)]
    assert len(computed) == len(set(computed))
    assert set(computed) == {tuple(query.tokens[:end]) for query in queries for end in range(1, len(query.tokens) + 1)}
    wanted = [
        (number, position, target, tuple(path.tokens[: position + 1]))
        for path in paths
        for position, who in path.wanted.items()
        for number, target in who
    ]
    assert sorted(wanted) == sorted(
        (number, position, target, tuple(query.tokens[: position + 1]))
        for number, query in enumerate(queries)
        for position, target in enumerate(query.targets, len(query.tokens) - len(query.targets))
    )
    assert all(path.common <= position < len(path.tokens) for path in paths for position in path.wanted)


@given(QUERIES)
def test_what_a_path_shares_is_what_the_one_before_it_has(queries):
    paths = lay_out(queries)
    for before, path in itertools.pairwise(paths):
        assert np.array_equal(before.tokens[: path.common], path.tokens[: path.common])


@given(QUERIES, st.integers(1, 5))
def test_the_runs_of_slots_are_all_paths_in_order(queries, count):
    paths = lay_out(queries)
    runs = chains(paths, count)
    assert [index for run in runs for index in run] == list(range(len(paths)))
    assert len(runs) <= count


def question(context: int, answers: int = 4) -> list[Query]:
    return [Query([context] * 50 + [context, answer], [7]) for answer in range(100, 100 + answers)]


def test_a_questions_choices_stay_in_one_slot_and_questions_are_spread():
    assert chains(lay_out(question(1)), 8) == [range(4)]
    many = lay_out([query for context in range(1, 9) for query in question(context)])
    assert chains(many, 4) == [range(0, 8), range(8, 16), range(16, 24), range(24, 32)]
