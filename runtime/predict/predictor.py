"""What predictors share: texts are encoded, refused where the model cannot take them, and run in padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.forward import ForwardSession
from runtime.session import Floats, remarks
from runtime.tokenizer import Encoded, Tokenizer

BATCH = 8


class Predictor:
    """A bundle on a backend.

    Attributes:
        task: of the bundles it runs.
        bundle, tokenizer: what it was opened from.
        backend: what runs the graph: `onnxruntime-cpu`.
        remarks: what a user should know: why this backend, and that it was not checked where it was not.
        max_length: tokens of a text, with the special ones.
    """

    task: ClassVar[str]

    def __init__(self, bundle: Bundle, session: ForwardSession) -> None:
        self.bundle = bundle
        self.tokenizer = Tokenizer(bundle)
        self.backend = session.backend
        self.remarks = remarks(bundle, session.choice)
        self.max_length = session.max_length
        self._session = session
        self._pad = self._padding_id()

    def _encode(self, texts: str | Sequence[str]) -> list[Encoded]:
        """The texts as tokens; a text alone is a list of one.

        Raises:
            UserError: no text, an empty one, or one that is too long.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not len(texts):
            raise UserError("there is no text; give at least one")
        encoded = []
        for number, text in enumerate(texts, start=1):
            if not text:
                raise UserError(f"text {number} is empty; give some text")
            encoded.append(self.tokenizer.encode_offsets(text))
            if not encoded[-1].ids:
                raise UserError(f"text {number} has no tokens; give some text")
            if (count := len(encoded[-1].ids)) > self.max_length:
                raise UserError(
                    f"text {number} has {count} tokens, {self.bundle.path} takes {self.max_length}; shorten it, or "
                    "export with a larger --max-length"
                )
        return encoded

    def _rows(self, encoded: Sequence[Encoded], batch_size: int) -> Iterator[tuple[Encoded, dict[str, Floats]]]:
        """Run the texts, `batch_size` at once, padded on the right: each with its rows of the graph's outputs.

        Raises:
            UserError: a batch of none.
        """
        if batch_size < 1:
            raise UserError(f"batch_size should be at least 1, not {batch_size}")
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            shape = len(batch), max(len(row.ids) for row in batch)
            ids, mask = np.full(shape, self._pad), np.zeros(shape, np.int64)
            for row, text in enumerate(batch):
                ids[row, : len(text.ids)], mask[row, : len(text.ids)] = text.ids, 1
            outputs = self._session.run(ids, mask)
            for row, text in enumerate(batch):
                yield text, {name: array[row] for name, array in outputs.items()}

    def _padding_id(self) -> int:
        """config.json's pad_token_id, by which a graph may look for padding; any id where it has none.

        Raises:
            UserError: no graph could take it.
        """
        found = self.bundle.config.get("pad_token_id")
        if found is None:
            return 0
        if not isinstance(found, int) or not 0 <= found < self.bundle.vocab_size:
            raise UserError(
                f"{self.bundle.path}: pad_token_id {found!r} is no token id within 0..{self.bundle.vocab_size - 1}; "
                "correct or remove it in the checkpoint's config.json, and export again"
            )
        return found


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Probabilities along the last axis."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probabilities: NDArray[np.float64] = powers / powers.sum(-1, keepdims=True)
    return probabilities
