"""Embeddings of texts, from the model's last hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np

from runtime.contract import LAST_HIDDEN_STATE
from runtime.errors import UserError
from runtime.predict.predictor import BATCH, Predictor
from runtime.session import Floats

Pooling = Literal["mean", "last"]


class FeatureExtractor(Predictor):
    """A bundle of task feature-extraction."""

    task: ClassVar[str] = "feature-extraction"

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        batch_size: int = BATCH,
    ) -> Floats:
        """One vector for each text.

        Args:
            texts: a text, or several.
            pooling: `mean` of the hidden states of all tokens, or the `last` token's, which alone has seen the
                whole text. Special tokens are tokens, padding is not.
            normalize: scale each vector to length 1, so that products are cosines.
            batch_size: texts that run at once.

        Returns:
            float32 [texts, hidden].

        Raises:
            UserError: no text, an empty or too long one, or another pooling.
        """
        if pooling not in ("mean", "last"):
            raise UserError(f"unknown pooling {pooling!r}; known: mean, last")
        found = self.hidden_states(texts, batch_size=batch_size)
        embeddings: Floats = np.stack([states.mean(0) if pooling == "mean" else states[-1] for states in found])
        if normalize:
            embeddings /= np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
        return embeddings

    def hidden_states(self, texts: str | Sequence[str], *, batch_size: int = BATCH) -> Iterator[Floats]:
        """The last hidden states of each text's tokens, special ones included, padding not.

        Args:
            texts: a text, or several.
            batch_size: texts that run at once.

        Yields:
            For each text float32 [tokens, hidden].

        Raises:
            UserError: no text, an empty or too long one.
        """
        for text, outputs in self._rows(self._encode(texts), batch_size):
            yield outputs[LAST_HIDDEN_STATE][: len(text.ids)]
