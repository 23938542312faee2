"""transformers on torch: the model as its checkpoint is, in a cache that grows: CHECKPOINT DTYPE THREADS."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.bench.serve import Unable, serve


class Transformers:
    """A model, and caches with the tokens that they go on from."""

    packages: tuple[str, ...] = ("transformers", "torch")

    def __init__(self, checkpoint: str, dtype: str, threads: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(int(threads))
        torch.set_grad_enabled(False)
        self._torch, self._cache = torch, DynamicCache
        self._model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self._states: dict[str, tuple[Any, Any]] = {}
        self.weight_bytes: int | None = self._read()
        config, item = self._model.config, self._model.dtype.itemsize
        self.cache_bytes: int | None = (
            2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * item
        )

    def prompt(self, state: str, prompts: NDArray[np.int32], capacity: int) -> list[int]:
        """A new cache, the old one's memory given back."""
        positions = self._model.config.max_position_embeddings
        if capacity > positions:
            raise Unable(f"{capacity} tokens pass the {positions} positions of the checkpoint")
        self._states.pop(state, None)
        return self._forward(state, self._torch.from_numpy(prompts).long(), self._cache(config=self._model.config))

    def step(self, state: str) -> list[int]:
        """One token more in every row."""
        return self._forward(state, *self._states[state])

    def _forward(self, state: str, tokens: Any, cache: Any) -> list[int]:
        logits = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        chosen = logits.argmax(-1)
        self._states[state] = chosen[:, None], cache
        return [int(token) for token in chosen]

    def _read(self) -> int:
        """Bytes of all parameters, but of an embedding that is not the head too a row."""
        embedding = self._model.get_input_embeddings().weight
        unread = 0 if self._model.get_output_embeddings().weight is embedding else embedding[1:].nbytes
        return sum(int(parameter.nbytes) for parameter in self._model.parameters()) - int(unread)


if __name__ == "__main__":
    serve(lambda: Transformers(*sys.argv[1:]))
