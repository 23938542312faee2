"""Classes of texts, as transformers' `text-classification` returns them."""

from __future__ import annotations

from typing import Any, ClassVar, TypedDict, Unpack

from runtime.errors import UserError
from runtime.pipelines.base import Pipeline, as_texts
from runtime.predict.predictor import BATCH
from runtime.predict.text_classification import Function, TextClassifier


class ClassArguments(TypedDict, total=False):
    """Arguments of a call.

    Attributes:
        top_k: how many classes, None for all; where it is given each text has a list of them, else its likeliest alone.
        function_to_apply: what makes scores of logits: `softmax`, `sigmoid` or `none` (default: by the checkpoint's
            problem_type).
        batch_size: texts that run at once (8).
    """

    top_k: int | None
    function_to_apply: Function | None
    batch_size: int


class TextClassificationPipeline(Pipeline[TextClassifier]):
    """A bundle of task text-classification."""

    task: ClassVar[str] = "text-classification"
    known: ClassVar[tuple[str, ...]] = tuple(ClassArguments.__annotations__)

    def __call__(self, inputs: str | list[str], **arguments: Unpack[ClassArguments]) -> list[Any]:
        """Classify texts.

        Args:
            inputs: a text, or a list of them.
            arguments: see `ClassArguments`.

        Returns:
            `{"label": …, "score": …}` of each text, in a list for a single one too. With `top_k` a list of them, the
            likeliest first, of each text; for a single text its list alone, unless `top_k` is the pipeline's own
            argument: so it is in transformers.

        Raises:
            UserError: an unknown argument, no text, an empty or too long one, or a pair of texts.
        """
        chosen = self._arguments(arguments)
        top_k = chosen.get("top_k")
        if top_k is not None and top_k < 1:
            raise UserError(f"top_k should be at least 1, or None for all classes; found {top_k}")
        texts, alone = as_texts(inputs)
        found = self.model.classify(
            texts,
            function_to_apply=chosen.get("function_to_apply"),
            batch_size=chosen.get("batch_size", BATCH),
        )
        rows = [result.to_json()["labels"] for result in found]
        if "top_k" not in chosen:
            return [row[0] for row in rows]
        rows = [row[:top_k] for row in rows]
        return list(rows[0]) if alone and "top_k" in arguments else rows
