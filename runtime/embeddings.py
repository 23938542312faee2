"""`embed_tokens.npy`: the token embeddings of a bundle whose graph takes embeddings in place of token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.contract import EMBED_TOKENS, INPUTS_EMBEDS
from runtime.errors import UserError
from runtime.kv_cache import numpy_dtype


class Embeddings:
    """The table [vocab, hidden], mapped into memory: only the rows that are looked up are read."""

    def __init__(self, bundle: Bundle) -> None:
        """Map the file.

        Raises:
            UserError: it is missing, damaged, or has not a row for every token id, as wide as the graph takes.
        """
        path = bundle.file(EMBED_TOKENS)
        spec = next(spec for spec in bundle.manifest.graph.inputs if spec.name == INPUTS_EMBEDS)
        try:
            self._table: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path} is damaged ({error}); copy or export the bundle again") from error
        shape, size = self._table.shape, (bundle.vocab_size, spec.shape[-1])
        if len(shape) != 2 or shape[0] < size[0] or (isinstance(size[1], int) and shape[1] != size[1]):
            raise UserError(f"{path} has shape {shape}, the graph takes {size}; export the bundle again")
        self._dtype = numpy_dtype(spec.dtype)

    def look_up(self, tokens: NDArray[np.int64]) -> NDArray[Any]:
        """The rows of these token ids, [*tokens.shape, hidden], in the dtype that the graph takes."""
        return np.ascontiguousarray(self._table[tokens], self._dtype)
