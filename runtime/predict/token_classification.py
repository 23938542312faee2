"""Classes of the tokens of a text, and of the runs that they form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.contract import LOGITS
from runtime.forward import ForwardSession
from runtime.predict.labels import labels_of
from runtime.predict.predictor import BATCH, Predictor, softmax
from runtime.tokenizer import Encoded

Token = TypeVar("Token")


@dataclass(frozen=True)
class Tag:
    """The likeliest class of a token, or of several, whose characters are start..end of the text."""

    text: str
    label: str
    score: float
    start: int
    end: int


@dataclass(frozen=True)
class TaggedText:
    """The tags of one text's tokens, in its order; tokens that the tokenizer added have none."""

    text: str
    tokens: tuple[Tag, ...]

    def entities(self, ignore: Sequence[str] = ("O",)) -> list[Tag]:
        """Runs of tokens of one class, as transformers' aggregation strategy "simple" joins them.

        The score is the mean over the tokens; see `runs_of`.

        Args:
            ignore: classes that are left out.
        """
        joined = [self._join(run) for run in runs_of(self.tokens, lambda token: token.label)]
        return [entity for entity in joined if entity.label not in ignore]

    def to_json(self) -> dict[str, Any]:
        """As the command `predict` prints it."""
        return {"tokens": [vars(tag) for tag in self.tokens], "entities": [vars(tag) for tag in self.entities()]}

    def _join(self, run: Sequence[Tag]) -> Tag:
        start, end = run[0].start, run[-1].end
        score = sum(tag.score for tag in run) / len(run)
        return Tag(self.text[start:end], run[0].label.split("-", 1)[-1], score, start, end)


class TokenClassifier(Predictor):
    """A bundle of task token-classification; `labels` are its classes in the order of the logits."""

    task: ClassVar[str] = "token-classification"

    def __init__(self, bundle: Bundle, session: ForwardSession) -> None:
        super().__init__(bundle, session)
        self.labels = labels_of(bundle)

    def tag(self, texts: str | Sequence[str], *, batch_size: int = BATCH) -> list[TaggedText]:
        """The likeliest class of each token of each text, and its probability.

        Args:
            texts: a text, or several.
            batch_size: texts that run at once.

        Raises:
            UserError: no text, an empty or too long one.
        """
        texts = [texts] if isinstance(texts, str) else texts
        rows = self.scores(texts, batch_size=batch_size)
        return [TaggedText(text, self._tags(text, *row)) for text, row in zip(texts, rows, strict=True)]

    def scores(
        self, texts: str | Sequence[str], *, batch_size: int = BATCH
    ) -> Iterator[tuple[Encoded, NDArray[np.float64]]]:
        """Each text's tokens, and the probability of every class for each, [tokens, labels], special ones included.

        Args:
            texts: a text, or several.
            batch_size: texts that run at once.

        Raises:
            UserError: no text, an empty or too long one.
        """
        for encoded, outputs in self._rows(self._encode(texts), batch_size):
            yield encoded, softmax(outputs[LOGITS][: len(encoded.ids)])

    def _tags(self, text: str, encoded: Encoded, scores: NDArray[np.float64]) -> tuple[Tag, ...]:
        tags = []
        for (start, end), added, row in zip(encoded.offsets, encoded.special, scores, strict=True):
            if not added:
                best = int(row.argmax())
                tags.append(Tag(text[start:end], self.labels[best], float(row[best]), start, end))
        return tuple(tags)


def runs_of(tokens: Iterable[Token], label_of: Callable[[Token], str]) -> list[list[Token]]:
    """Neighbours of one class.

    `B-` begins a run and `I-` goes on with it; a label without either goes on with a run of its own kind.
    """
    runs: list[list[Token]] = []
    for token in tokens:
        label = label_of(token)
        if runs and _kind(label_of(runs[-1][-1])) == _kind(label) and not label.startswith("B-"):
            runs[-1].append(token)
        else:
            runs.append([token])
    return runs


def _kind(label: str) -> str:
    """A label without what says where in a run it stands."""
    return label[2:] if label.startswith(("B-", "I-")) else label
