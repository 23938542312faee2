"""The oracle is every span tried in turn, on logits by numpy."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_bundles import MAX_LENGTH, SEPARATOR, WORDS, Toy

from runtime import load
from runtime.errors import UserError
from runtime.predict.question_answering import Answer, QuestionAnswerer, _spans
from runtime.tokenizer import Encoded

QUESTION, CONTEXT = "what is red", "the  sun is a star mars is red the moon is old"
TOY = Toy("question-answering")


@pytest.fixture
def model(tmp_path: Path) -> QuestionAnswerer:
    return load(TOY.write(tmp_path / "toy", golden=True), task="question-answering")


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def spans(ids: list[int], context: list[int], longest: int) -> dict[tuple[int, int], float]:
    """The score of every span, by the context's tokens: softmax over the context alone, the product of both."""
    logits = TOY.logits([*ids, *context])[len(ids) :].astype(np.float64)
    start, end = np.exp(logits).T / np.exp(logits).sum(0)[:, None]
    size = len(context)
    return {(a, b): start[a] * end[b] for a in range(size) for b in range(a, min(size, a + longest))}


def characters(context: str, first: int, last: int) -> tuple[int, int]:
    places, at = [], 0
    for word in context.split():
        at = context.index(word, at)
        places.append((at, at + len(word)))
        at += len(word)
    return places[first][0], places[last][1]


@pytest.mark.parametrize("longest", [1, 3, 15])
@pytest.mark.parametrize("pair", [True, False])
def test_the_best_spans_are_those_of_all_that_there_are(pair: bool, longest: int, tmp_path: Path) -> None:
    """With a template for pairs, and with one that only puts them behind each other."""
    model = load(TOY.write(tmp_path / "toy", pair=pair), task="question-answering")
    before = [1, *ids_of(QUESTION), SEPARATOR] if pair else ids_of(QUESTION)
    scores = spans(before, ids_of(CONTEXT), longest)
    best = sorted(scores, key=lambda span: -scores[span])[:5]
    found = model.answer(QUESTION, CONTEXT, top_k=5, max_answer_len=longest)
    assert [(answer.start, answer.end) for answer in found] == [characters(CONTEXT, *span) for span in best]
    np.testing.assert_allclose([answer.score for answer in found], [scores[span] for span in best], rtol=1e-4)
    assert all(answer.text == CONTEXT[answer.start : answer.end] for answer in found)
    assert model.answer(QUESTION, CONTEXT, max_answer_len=longest) == found[:1]


def test_there_are_no_more_answers_than_spans(model: QuestionAnswerer) -> None:
    found = model.answer(QUESTION, "mars is", top_k=9)
    assert sorted((answer.start, answer.end) for answer in found) == [(0, 4), (0, 7), (5, 7)]
    assert [a.score >= b.score for a, b in pairwise(found)] == [True, True]


def test_a_long_context_is_read_in_windows_that_overlap(model: QuestionAnswerer) -> None:
    random = np.random.default_rng(3)
    words = [WORDS[i] for i in random.integers(4, len(WORDS), 60)]
    context = " ".join(words)
    before, room = [1, *ids_of(QUESTION), SEPARATOR], MAX_LENGTH - 5
    best: dict[tuple[int, int], float] = {}
    for start in range(0, 60 - 6, room - 6):
        scores = spans(before, ids_of(" ".join(words[start : start + room])), 15)
        for (first, last), score in scores.items():
            span = characters(context, start + first, start + last)
            best[span] = max(score, best.get(span, 0))
    expected = sorted(best, key=lambda span: -best[span])[:4]
    found = model.answer(QUESTION, context, top_k=4, doc_stride=6, batch_size=2)
    assert [(answer.start, answer.end) for answer in found] == expected
    np.testing.assert_allclose([answer.score for answer in found], [best[span] for span in expected], rtol=1e-4)


def test_an_answer_neither_begins_nor_ends_with_a_space() -> None:
    window = Encoded([5, 6, 7, 8], [(0, 3), (0, 5), (5, 6), (6, 9)], [False] * 4, [0, 1, 1, 1])
    outputs = {name: np.array([9, 1, 5, 0], np.float32) for name in ("start_logits", "end_logits")}
    found = list(_spans(" Mars  is", window, outputs, 9, 15))
    assert [(answer.text, answer.start, answer.end) for answer in found] == [
        ("Mars", 1, 5), ("Mars  is", 1, 9), ("is", 7, 9)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("question", "context", "options", "message"),
    [
        ("", CONTEXT, {}, "the question is empty; give"),
        (QUESTION, "", {}, "the context is empty; give"),
        (QUESTION, "  ", {}, "the context has no tokens; give"),
        ("what " * 30, CONTEXT, {}, f"the question has 32 tokens, .* takes {MAX_LENGTH} with the context; shorten"),
        (QUESTION, CONTEXT, {"top_k": 0}, "top_k should be at least 1, not 0"),
        (QUESTION, CONTEXT, {"max_answer_len": 0}, "max_answer_len should be at least 1, not 0"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    model: QuestionAnswerer, question: str, context: str, options: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        model.answer(question, context, **options)
    assert "\n" not in str(error.value)


def test_an_answer_is_json() -> None:
    assert json.loads(json.dumps(Answer("red", 0.5, 3, 6).to_json())) == {
        "text": "red", "score": 0.5, "start": 3, "end": 6
    }  # fmt: skip
