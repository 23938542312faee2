"""Classes of whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.contract import LOGITS
from runtime.errors import UserError
from runtime.forward import ForwardSession
from runtime.predict.labels import labels_of
from runtime.predict.predictor import BATCH, Predictor, softmax
from runtime.session import Floats

Function = Literal["softmax", "sigmoid", "none"]


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

    def classify(
        self, texts: str | Sequence[str], *, function_to_apply: Function | None = None, batch_size: int = BATCH
    ) -> list[Classification]:
        """Score every class for each text, as transformers' pipeline does.

        Scores are probabilities that sum to 1; with problem_type multi_label_classification, or one label, each on
        its own (sigmoid); with problem_type regression the model's values themselves.

        Args:
            texts: a text, or several.
            function_to_apply: what makes scores of logits, whatever the problem_type.
            batch_size: texts that run at once.

        Raises:
            UserError: no text, an empty or too long one, or another function.
        """
        if function_to_apply not in (None, *get_args(Function)):
            raise UserError(f"unknown function_to_apply {function_to_apply!r}; known: {', '.join(get_args(Function))}")
        function = function_to_apply or self._function
        results = []
        for _, outputs in self._rows(self._encode(texts), batch_size):
            scores = _scores(outputs[LOGITS], function)
            order = np.argsort(-scores, kind="stable")
            results.append(Classification(tuple(LabelScore(self.labels[i], float(scores[i])) for i in order)))
        return results

    @property
    def _function(self) -> Function:
        problem = self.bundle.config.get("problem_type")
        if problem == "regression":
            return "none"
        return "sigmoid" if problem == "multi_label_classification" or len(self.labels) == 1 else "softmax"


def _scores(logits: Floats, function: Function) -> NDArray[np.floating]:
    match function:
        case "none":
            return logits
        case "sigmoid":
            return np.exp(-np.logaddexp(0, -logits.astype(np.float64)))  # without overflow
        case "softmax":
            return softmax(logits)
