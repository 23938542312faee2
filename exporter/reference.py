"""The model as transformers computes it: eager attention on whole rows, in fp32 or any other dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache, NemotronForCausalLM
from transformers.utils import logging

from exporter.checkpoint import Checkpoint
from exporter.trace import cached_layers

Floats = NDArray[np.float64]
Cache = list[tuple[NDArray[np.float32], NDArray[np.float32]]]


@dataclass(frozen=True)
class Forward:
    """What one forward pass over one row gave.

    Attributes:
        logits: float64 [sequence, vocab].
        keys, values: float64 [layers, kv_heads, sequence, head_dim], of the new positions only.
    """

    logits: Floats
    keys: Floats
    values: Floats

    @property
    def finite(self) -> bool:
        """Whether every number of it is."""
        return all(bool(np.isfinite(array).all()) for array in (self.logits, self.keys, self.values))


@dataclass(frozen=True)
class Row:
    """What a forward pass runs: token ids, after a cache of per layer rotated key and value.

    Attributes:
        tokens: the new token ids.
        past: per layer key and value, float32 [kv_heads, past, head_dim]; empty for none.
    """

    tokens: Sequence[int]
    past: Cache = field(default_factory=list)


class Reference:
    """transformers' NemotronForCausalLM on the checkpoint's weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._path = checkpoint.path
        self._config = type(checkpoint.spec.config).from_dict(checkpoint.spec.config.to_dict())

    def forwards(self, rows: Sequence[Row], dtype: torch.dtype = torch.float32) -> list[Forward]:
        """Run rows one by one, with weights, activations and cache in this dtype.

        The model is in memory within this call alone: two dtypes at once would be the gate's largest need.
        """
        model = self._load(dtype)
        return [self._run(model, row) for row in rows]

    def _load(self, dtype: torch.dtype) -> NemotronForCausalLM:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        return NemotronForCausalLM.from_pretrained(
            self._path,
            config=self._config,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
        )

    def _run(self, model: NemotronForCausalLM, row: Row) -> Forward:
        cache = DynamicCache(config=self._config)
        for layer, pair in enumerate(row.past):
            key, value = (torch.from_numpy(array)[None].to(model.dtype) for array in pair)
            cache.update(key, value, layer)
        with torch.no_grad():
            output = model(torch.tensor([list(row.tokens)]), past_key_values=cache, use_cache=True)
        new = slice(-len(row.tokens), None)
        layers = cached_layers(cache)
        keys = torch.stack([layer.keys[0, :, new] for layer in layers if layer.keys is not None])
        values = torch.stack([layer.values[0, :, new] for layer in layers if layer.values is not None])
        return Forward(*(tensor.double().numpy() for tensor in (output.logits[0], keys, values)))
