"""Classes of whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.contract import LOGITS
from runtime.forward import ForwardSession
from runtime.predict.labels import labels_of
from runtime.predict.predictor import BATCH, Predictor, softmax
from runtime.session import Floats


@dataclass(frozen=True)
class LabelScore:
    """A class and how much speaks for it."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification:
    """Every class of one text, the likeliest first."""

    labels: tuple[LabelScore, ...]

    def to_json(self) -> dict[str, Any]:
        """As the command `predict` prints it."""
        return {"labels": [vars(label) for label in self.labels]}


class TextClassifier(Predictor):
    """A bundle of task text-classification; `labels` are its classes in the order of the logits."""

    task: ClassVar[str] = "text-classification"

    def __init__(self, bundle: Bundle, session: ForwardSession) -> None:
        super().__init__(bundle, session)
        self.labels = labels_of(bundle)

    def classify(self, texts: str | Sequence[str], *, batch_size: int = BATCH) -> list[Classification]:
        """Score every class for each text, as transformers' pipeline does.

        Scores are probabilities that sum to 1; with problem_type multi_label_classification, or one label, each on
        its own (sigmoid); with problem_type regression the model's values themselves.

        Args:
            texts: a text, or several.
            batch_size: texts that run at once.

        Raises:
            UserError: no text, an empty or too long one.
        """
        results = []
        for _, outputs in self._rows(self._encode(texts), batch_size):
            scores = self._scores(outputs[LOGITS])
            order = np.argsort(-scores, kind="stable")
            results.append(Classification(tuple(LabelScore(self.labels[i], float(scores[i])) for i in order)))
        return results

    def _scores(self, logits: Floats) -> NDArray[np.floating]:
        problem = self.bundle.config.get("problem_type")
        if problem == "regression":
            return logits
        if problem == "multi_label_classification" or len(self.labels) == 1:
            return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))  # the sigmoid, without overflow
        return softmax(logits)
