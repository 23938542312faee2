"""Shapes as transformers 4 had them; version 5 has no such pipeline. The answers' own oracle is beside `predict`."""

from pathlib import Path
from typing import Any

import pytest
from forward_bundles import Toy

from runtime import pipeline
from runtime.errors import UserError
from runtime.pipelines.question_answering import QuestionAnsweringPipeline

QUESTIONS = ["what is red", "who is old"]
CONTEXTS = ["the sun is a star mars is red", "the  moon is old and cold"]


@pytest.fixture
def pipe(tmp_path: Path) -> QuestionAnsweringPipeline:
    return pipeline("question-answering", Toy("question-answering").write(tmp_path / "toy"))


def expected(pipe: QuestionAnsweringPipeline, row: int, context: int | None = None, **options: int) -> list[Any]:
    answers = pipe.model.answer(QUESTIONS[row], CONTEXTS[row if context is None else context], **options)
    return [{"score": a.score, "start": a.start, "end": a.end, "answer": a.text} for a in answers]


def test_one_question_has_one_answer_and_several_a_list(pipe: QuestionAnsweringPipeline) -> None:
    pairs = [{"question": q, "context": c} for q, c in zip(QUESTIONS, CONTEXTS, strict=True)]
    (first,), (second,) = expected(pipe, 0), expected(pipe, 1)
    assert CONTEXTS[0][first["start"] : first["end"]] == first["answer"]
    for one in (
        pipe(question=QUESTIONS[0], context=CONTEXTS[0]),
        pipe(QUESTIONS[0], CONTEXTS[0]),
        pipe(pairs[0]),
        pipe(pairs[:1]),
    ):
        assert one == first
    for both in (pipe(pairs), pipe(*pairs), pipe(question=QUESTIONS, context=CONTEXTS)):
        assert both == [first, second]
    assert pipe(question=QUESTIONS, context=CONTEXTS[0]) == [first, *expected(pipe, 1, 0)]


def test_several_answers_are_a_list(pipe: QuestionAnsweringPipeline) -> None:
    options = {"top_k": 3, "max_answer_len": 2}
    rows = [expected(pipe, row, **options) for row in (0, 1)]
    assert pipe(QUESTIONS[0], CONTEXTS[0], **options) == rows[0]
    assert pipe(question=QUESTIONS, context=CONTEXTS, **options) == rows
    assert len(rows[0]) == 3


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ((), {}, "there is no question; give question="),
        ((), {"question": "what"}, "there is no context; give question="),
        (([],), {}, "there is no question; give"),
        (({"question": "what"},), {}, "a question should come as question=.*; found the keys question"),
        (("what",), {}, "a question should come as .*; found str"),
        ((), {"question": ["a", "b"], "context": ["c"]}, "there are 2 questions and 1 contexts; give one context"),
        (("a", "b"), {"handle_impossible_answer": True}, "does not take handle_impossible_answer; known: batch_size"),
        (("a", "b"), {"align_to_words": True}, "does not take align_to_words; known: batch_size, doc_stride"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    pipe: QuestionAnsweringPipeline, inputs: Any, arguments: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        pipe(*inputs, **arguments)
    assert "\n" not in str(error.value)
