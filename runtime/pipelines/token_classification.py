"""Classes of tokens, words and runs of them, as transformers' `token-classification` returns them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError
from runtime.pipelines.base import Pipeline, as_texts
from runtime.predict.predictor import BATCH
from runtime.predict.token_classification import TokenClassifier, runs_of
from runtime.tokenizer import Encoded

Scores = NDArray[np.float64]


class TokenArguments(TypedDict, total=False):
    """Arguments of a call.

    Attributes:
        aggregation_strategy: `none` gives tokens (default). The others give runs: `simple` of tokens; `first`,
            `average` and `max` of words, whose class is that of the first token, of the tokens' mean, or of the surest.
        ignore_labels: classes that are left out (`["O"]`).
        batch_size: texts that run at once (8).
    """

    aggregation_strategy: Literal["none", "simple", "first", "average", "max"]
    ignore_labels: Sequence[str]
    batch_size: int


@dataclass(frozen=True)
class _Piece:
    """A token, or a word: its spelling, the characters that it is, and the scores of every class [labels].

    Attributes:
        index: of a token, among all of its text.
        begins: whether a word begins with it.
    """

    word: str
    start: int
    end: int
    scores: Scores
    index: int = 0
    begins: bool = True


class TokenClassificationPipeline(Pipeline[TokenClassifier]):
    """A bundle of task token-classification."""

    task: ClassVar[str] = "token-classification"
    known: ClassVar[tuple[str, ...]] = tuple(TokenArguments.__annotations__)

    def __call__(self, inputs: str | list[str], **arguments: Unpack[TokenArguments]) -> list[Any]:
        """Tag texts.

        Args:
            inputs: a text, or a list of them.
            arguments: see `TokenArguments`.

        Returns:
            Of a text, in its order, `{"entity": …, "score": …, "index": …, "word": …, "start": …, "end": …}` for each
            token; with a strategy `{"entity_group": …, "score": …, "word": …, "start": …, "end": …}` for each run. Of a
            list of texts a list of those.

        Raises:
            UserError: an unknown argument or strategy, no text, an empty or too long one.
        """
        chosen = self._arguments(arguments)
        strategy = str(chosen.get("aggregation_strategy") or "none").lower()
        if strategy not in _STRATEGIES:
            raise UserError(f"unknown aggregation_strategy {strategy!r}; known: {', '.join(_STRATEGIES)}")
        ignored = chosen.get("ignore_labels", ("O",))
        texts, alone = as_texts(inputs)
        found = []
        rows = self.model.scores(texts, batch_size=chosen.get("batch_size", BATCH))
        for text, (encoded, scores) in zip(texts, rows, strict=True):
            tokens = list(self._tokens(text, encoded, scores))
            entities = self._entities(tokens) if strategy == "none" else self._groups(tokens, strategy)
            found.append([row for row in entities if row.get("entity", row.get("entity_group")) not in ignored])
        return found[0] if alone else found

    def _tokens(self, text: str, encoded: Encoded, scores: Scores) -> Iterator[_Piece]:
        """The tokens that the tokenizer did not add."""
        tokenizer = self.model.tokenizer
        for index, (token, (start, end)) in enumerate(zip(encoded.ids, encoded.offsets, strict=True)):
            if encoded.special[index]:
                continue
            word = tokenizer.token(token)
            begins = start == 0 or " " in text[start - 1 : start + 1]
            if tokenizer.marks_subwords:
                begins = len(word) == end - start
            if token == tokenizer.unknown_id:
                word, begins = text[start:end], True
            yield _Piece(word, start, end, scores[index], index, begins)

    def _entities(self, tokens: Sequence[_Piece]) -> list[dict[str, Any]]:
        return [
            {"entity": self._label(token), "score": float(token.scores.max()), "index": token.index,
             "word": token.word, "start": token.start, "end": token.end}
            for token in tokens
        ]  # fmt: skip

    def _groups(self, tokens: Sequence[_Piece], strategy: str) -> list[dict[str, Any]]:
        """Neighbours of one class, by their labels' `B-` and `I-`."""
        reduce = _STRATEGIES[strategy]
        pieces = tokens if reduce is None else self._words(tokens, reduce)
        return [
            {"entity_group": self._label(run[0]).split("-", 1)[-1],
             "score": float(np.mean([piece.scores.max() for piece in run])),
             "word": self.model.tokenizer.join([piece.word for piece in run]),
             "start": run[0].start, "end": run[-1].end}
            for run in runs_of(pieces, self._label)
        ]  # fmt: skip

    def _words(self, tokens: Sequence[_Piece], reduce: Callable[[Scores], Scores]) -> list[_Piece]:
        """Words, each with the scores that its tokens' [tokens, labels] come to."""
        words: list[list[_Piece]] = []
        for token in tokens:
            if token.begins or not words:
                words.append([token])
            else:
                words[-1].append(token)
        return [
            _Piece(
                self.model.tokenizer.join([token.word for token in word]),
                word[0].start,
                word[-1].end,
                reduce(np.stack([token.scores for token in word])),
            )
            for word in words
        ]

    def _label(self, piece: _Piece) -> str:
        return self.model.labels[int(piece.scores.argmax())]


def _mean(scores: Scores) -> Scores:
    row: Scores = scores.mean(0)
    return row


def _surest(scores: Scores) -> Scores:
    row: Scores = scores[scores.max(1).argmax()]
    return row


def _first(scores: Scores) -> Scores:
    row: Scores = scores[0]
    return row


# What makes a word's scores of its tokens'; None where tokens are taken as they are.
_STRATEGIES: dict[str, Callable[[Scores], Scores] | None] = {
    "none": None,
    "simple": None,
    "first": _first,
    "average": _mean,
    "max": _surest,
}
