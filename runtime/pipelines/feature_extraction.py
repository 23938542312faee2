"""The hidden states of every token, as transformers' `feature-extraction` returns them."""

from __future__ import annotations

from typing import Any, ClassVar, TypedDict, Unpack

from runtime.pipelines.base import Pipeline, as_texts
from runtime.predict.features import FeatureExtractor
from runtime.predict.predictor import BATCH


class FeatureArguments(TypedDict, total=False):
    """Arguments of a call.

    Attributes:
        return_tensors: numpy arrays in place of lists.
        batch_size: texts that run at once (8).
    """

    return_tensors: bool
    batch_size: int


class FeatureExtractionPipeline(Pipeline[FeatureExtractor]):
    """A bundle of task feature-extraction; one vector for each text is what `model.embed` has."""

    task: ClassVar[str] = "feature-extraction"
    known: ClassVar[tuple[str, ...]] = tuple(FeatureArguments.__annotations__)

    def __call__(self, inputs: str | list[str], **arguments: Unpack[FeatureArguments]) -> Any:
        """The last hidden states of a text's tokens, special ones included.

        Args:
            inputs: a text, or a list of them.
            arguments: see `FeatureArguments`.

        Returns:
            For a text [1, tokens, hidden] as nested lists, or as a float32 array; for a list of texts a list of
            those, each with as many tokens as it has.

        Raises:
            UserError: an unknown argument, no text, an empty or too long one.
        """
        chosen = self._arguments(arguments)
        texts, alone = as_texts(inputs)
        states = [found[None] for found in self.model.hidden_states(texts, batch_size=chosen.get("batch_size", BATCH))]
        rows = states if chosen.get("return_tensors") else [found.tolist() for found in states]
        return rows[0] if alone else rows
