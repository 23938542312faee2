"""Answers to questions, as transformers' `question-answering` returned them up to its version 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict, Unpack

from runtime.errors import UserError
from runtime.pipelines.base import Pipeline, as_texts
from runtime.predict.question_answering import QuestionAnswerer

_FORMS = 'question="…", context="…", or {"question": "…", "context": "…"}, or a list of those'


class AnswerArguments(TypedDict, total=False):
    """Arguments of a call.

    Attributes:
        top_k: how many answers (1).
        max_answer_len: tokens that an answer has at most (15).
        doc_stride: tokens that neighbouring windows of a long context share (128).
        batch_size: windows that run at once (8).
    """

    top_k: int
    max_answer_len: int
    doc_stride: int
    batch_size: int


class QuestionAnsweringPipeline(Pipeline[QuestionAnswerer]):
    """A bundle of task question-answering.

    Answers begin and end where tokens do, as with transformers' `align_to_words=False`. Of several, those that say the
    same in other places stay apart; transformers makes one of them and adds up their scores.
    """

    task: ClassVar[str] = "question-answering"
    known: ClassVar[tuple[str, ...]] = tuple(AnswerArguments.__annotations__)

    def __call__(
        self,
        *inputs: Any,
        question: str | list[str] | None = None,
        context: str | list[str] | None = None,
        **arguments: Unpack[AnswerArguments],
    ) -> Any:
        """Find the answers that contexts have.

        Args:
            inputs: `{"question": …, "context": …}`, a list of those, or a question and its context.
            question: a question, or a list of them.
            context: where it is answered: one for all questions, or one for each.
            arguments: see `AnswerArguments`.

        Returns:
            `{"score": …, "start": …, "end": …, "answer": …}`, whose answer is context[start:end]; a list of them, the
            likeliest first, where `top_k` gives several; for several questions a list of what each gives.

        Raises:
            UserError: an unknown argument, no question or context, an empty one, or a question that leaves no room.
        """
        options = self._arguments(arguments)
        found = [self._answers(*pair, options) for pair in _pairs(inputs, question, context)]
        return found[0] if len(found) == 1 else found

    def _answers(self, question: str, context: str, options: dict[str, Any]) -> Any:
        answers = [
            {"score": answer.score, "start": answer.start, "end": answer.end, "answer": answer.text}
            for answer in self.model.answer(question, context, **options)
        ]
        return answers[0] if len(answers) == 1 else answers


def _pairs(inputs: tuple[Any, ...], question: object, context: object) -> list[tuple[str, str]]:
    """Questions and their contexts, in whichever form they came."""
    if len(inputs) == 2 and all(isinstance(text, str) for text in inputs):
        return [(inputs[0], inputs[1])]
    if inputs:
        rows = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], list | tuple) else inputs
        if not rows:
            raise UserError(f"there is no question; give {_FORMS}")
        return [_pair(row) for row in rows]
    if question is None or context is None:
        raise UserError(f"there is no {'context' if question else 'question'}; give {_FORMS}")
    (questions, _), (contexts, one_for_all) = as_texts(question), as_texts(context)
    contexts = contexts * len(questions) if one_for_all else contexts
    if len(questions) != len(contexts) or not questions:
        raise UserError(
            f"there are {len(questions)} questions and {len(contexts)} contexts; give one context, or one for each"
        )
    return list(zip(questions, contexts, strict=True))


def _pair(row: object) -> tuple[str, str]:
    if isinstance(row, Mapping) and all(isinstance(row.get(name), str) for name in ("question", "context")):
        return row["question"], row["context"]
    found = f"the keys {', '.join(map(str, row)) or 'of nothing'}" if isinstance(row, Mapping) else type(row).__name__
    raise UserError(f"a question should come as {_FORMS}; found {found}")
