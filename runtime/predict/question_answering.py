"""Answers to questions: the span of a context that answers best."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from runtime.contract import END_LOGITS, START_LOGITS
from runtime.errors import UserError
from runtime.predict.predictor import BATCH, Predictor, softmax
from runtime.session import Floats, Ints
from runtime.tokenizer import Encoded


@dataclass(frozen=True)
class Answer:
    """A span of the context, context[start:end], and the probability that it begins and ends there."""

    text: str
    score: float
    start: int
    end: int

    def to_json(self) -> dict[str, Any]:
        """As the command `predict` prints it."""
        return dict(vars(self))


class QuestionAnswerer(Predictor):
    """A bundle of task question-answering."""

    task: ClassVar[str] = "question-answering"

    def answer(
        self,
        question: str,
        context: str,
        *,
        top_k: int = 1,
        max_answer_len: int = 15,
        doc_stride: int = 128,
        batch_size: int = BATCH,
    ) -> list[Answer]:
        """The best answers that the context has, the likeliest first, as transformers' pipeline finds them.

        A context too long for the model is read in windows that overlap; each span then has its best score.

        Args:
            question: what is asked.
            context: where the answer is looked for.
            top_k: how many answers, all different spans.
            max_answer_len: tokens that an answer has at most.
            doc_stride: tokens that neighbouring windows share, at most half of one.
            batch_size: windows that run at once.

        Returns:
            At most `top_k` answers.

        Raises:
            UserError: an empty question or context, a question that leaves no room, or a number below 1.
        """
        for name, number in (("top_k", top_k), ("max_answer_len", max_answer_len)):
            if number < 1:
                raise UserError(f"{name} should be at least 1, not {number}")
        best: dict[tuple[int, int], Answer] = {}
        for window, outputs in self._rows(self._windows(question, context, doc_stride), batch_size):
            for answer in _spans(context, window, outputs, top_k, max_answer_len):
                span = answer.start, answer.end
                if span not in best or best[span].score < answer.score:
                    best[span] = answer
        return sorted(best.values(), key=lambda answer: -answer.score)[:top_k]

    def _windows(self, question: str, context: str, stride: int) -> list[Encoded]:
        """The pair as tokens; the context in pieces where it is too long, each with the whole question."""
        for name, text in (("question", question), ("context", context)):
            if not text:
                raise UserError(f"the {name} is empty; give some text")
        whole = self.tokenizer.encode_offsets(question, context)
        inside = [at for at, part in enumerate(whole.parts) if part == 1]
        if not inside:
            raise UserError("the context has no tokens; give some text")
        around = len(whole.ids) - len(inside)
        room = self.max_length - around
        if room < 1:
            raise UserError(
                f"the question has {around} tokens, {self.bundle.path} takes {self.max_length} with the context; "
                "shorten it, or export with a larger --max-length"
            )
        if len(inside) <= room:
            return [whole]
        overlap = max(min(stride, room // 2), 0)
        before, after = range(inside[0]), range(inside[-1] + 1, len(whole.ids))
        starts = range(0, len(inside) - overlap, room - overlap)
        return [whole.take([*before, *inside[start : start + room], *after]) for start in starts]


def _spans(
    context: str, window: Encoded, outputs: dict[str, Floats], top_k: int, max_answer_len: int
) -> Iterator[Answer]:
    """The likeliest spans of a window's context: start ≤ end, and no longer than allowed."""
    inside: Ints = np.array([at for at, part in enumerate(window.parts) if part == 1])
    offsets = [window.offsets[at] for at in inside]
    begins, ends = (softmax(outputs[name][inside]) for name in (START_LOGITS, END_LOGITS))
    lasts = np.arange(len(inside))[:, None] + np.arange(min(max_answer_len, len(inside)))
    within = lasts < len(inside)
    lasts = np.where(within, lasts, 0)
    worded = np.array([bool(context[start:end].strip()) for start, end in offsets])
    scores = np.where(within & worded[:, None] & worded[lasts], begins[:, None] * ends[lasts], -1)
    for flat in np.argsort(-scores, axis=None, kind="stable")[:top_k]:
        first, column = divmod(int(flat), lasts.shape[1])
        if scores[first, column] < 0:
            return  # there are fewer spans than were asked for
        start, end = offsets[first][0], offsets[lasts[first, column]][1]
        text = context[start:end]
        start += len(text) - len(text.lstrip())  # a token may begin with the space before its word
        yield Answer(text.strip(), float(scores[first, column]), start, start + len(text.strip()))
