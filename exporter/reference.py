"""The model as transformers computes it: eager attention, in fp32 or any other dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache
from transformers.utils import logging

from exporter.checkpoint import Checkpoint
from exporter.rounded_cache import RoundedCache
from exporter.tasks import ARCHITECTURES, FEATURES, GENERATION, SEQUENCES, TASKS
from exporter.trace import cached_layers
from runtime.cache_scales import CacheScales
from runtime.contract import attentions_name, hidden_states_name
from runtime.errors import UserError
from runtime.session import Ints

Floats = NDArray[np.floating]
Cache = list[tuple[NDArray[np.float32], NDArray[np.float32]]]


@dataclass(frozen=True)
class Forward:
    """What one forward pass over one row gave.

    Attributes:
        logits: [sequence, vocab], float64 where the whole model ran.
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
        kept: of a rounded cache, the new tokens' keys and values as the bundle rounded them: near ties go as there.
        ties_turned: of a rounded cache, near ties go the other way.
    """

    tokens: Sequence[int]
    past: Cache = field(default_factory=list)
    kept: Cache = field(default_factory=list)
    ties_turned: bool = False


@dataclass(frozen=True)
class Batch:
    """Whole rows, padded on either side.

    Attributes:
        input_ids: int64 [batch, sequence], padding included.
        attention_mask: int64 [batch, sequence], 1 for real tokens.
        position_ids: int64 [batch, sequence]; None for transformers' own.
    """

    input_ids: Ints
    attention_mask: Ints
    position_ids: Ints | None = None

    def rows(self) -> list[Batch]:
        """Each row as a batch of its own, without its padding."""
        found = []
        for row, kept in enumerate(self.attention_mask != 0):
            arrays = (self.input_ids, self.attention_mask, self.position_ids)
            found.append(Batch(*(None if array is None else array[row : row + 1, kept] for array in arrays)))  # type: ignore[arg-type]
        return found


class Reference:
    """transformers' model of a task on the checkpoint's weights."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        task: str = GENERATION,
        weights: Mapping[str, Callable[[], torch.Tensor]] | None = None,
        scales: CacheScales | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            checkpoint: whose weights.
            task: whose head.
            weights: readers of parameters that stand in for the checkpoint's, by name.
            scales: of a cache that `forwards` rounds; None for one of the activations' dtype.
        """
        self._scales = scales
        self._checkpoint, self._task, self._weights = checkpoint, TASKS[task], weights or {}
        self._config = type(checkpoint.spec.config).from_dict(checkpoint.spec.config.to_dict())

    def forwards(self, rows: Sequence[Row], dtype: torch.dtype = torch.float32) -> list[Forward]:
        """Run rows of a causal LM one by one, with weights, activations and cache in this dtype.

        The model is in memory within this call alone: two dtypes at once would be the gate's largest need.
        """
        model = self.load(dtype)
        return [self._run(model, row) for row in rows]

    def each_logits(self, rows: Iterable[Sequence[int] | Ints]) -> Iterator[NDArray[np.float32]]:
        """Run rows of a causal LM one by one in fp32, each when it is asked for: float32 logits [sequence, vocab].

        The model is in memory from the first row to the last. Of rows, one at a time: with 256 000 tokens the logits of
        512 positions are half a gigabyte.
        """
        model = self.load(torch.float32)
        for row in rows:
            with torch.no_grad():
                logits = model(torch.tensor([list(row)]), use_cache=False).logits[0]
            yield logits.numpy()

    def outputs(self, batches: Sequence[Batch], dtype: torch.dtype = torch.float32) -> list[dict[str, Floats]]:
        """Run batches without a cache; what the task's graph can hand out, float64, by the graph's names.

        Where the model chooses a row's token by its padding and the configuration names none, transformers takes one
        row at a time only, and so they run.
        """
        model = self.load(dtype)
        alone = self._task.name == SEQUENCES and self._config.pad_token_id is None
        return [self._one_by_one(model, batch) if alone else self._all(model, batch) for batch in batches]

    def load(self, dtype: torch.dtype) -> Any:
        """The task's model in this dtype. Features are the base model of whatever class the checkpoint was saved as."""
        import transformers

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        own = ARCHITECTURES[self._checkpoint.spec.architecture]
        name = own.architecture if self._task.name == FEATURES else self._task.architecture
        model, report = getattr(transformers, name).from_pretrained(
            self._checkpoint.path,
            config=self._config,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=self._checkpoint.safetensors,
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):
            raise UserError(
                f"{self._checkpoint.path}: transformers finds no {missing[0]} for {name}; give a checkpoint of {name}"
            )
        self._adapt(model)
        self._replace(model)
        return model.base_model if self._task.name == FEATURES else model

    def _adapt(self, model: Any) -> None:
        """Put in the weights that an adapter changes, merged."""
        owned = dict(model.named_parameters())
        for name in self._checkpoint.adapted:
            prefixed = f"{model.base_model_prefix}.{name}"
            target = next((owned[known] for known in (name, prefixed) if known in owned), None)
            if target is not None:  # else of a head that this task does without
                target.data.copy_(self._checkpoint.read(name))

    def _replace(self, model: Any) -> None:
        """Put in the weights that stand in for the checkpoint's; what was tied to one of them keeps its own."""
        if self._weights and self._checkpoint.spec.tied:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        owned = dict(model.named_parameters())
        for name, read in self._weights.items():
            owned[name].data.copy_(read())

    def _run(self, model: Any, row: Row) -> Forward:
        scales = self._scales
        cache = DynamicCache(config=self._config) if scales is None else RoundedCache(self._config, scales, row)
        for layer, pair in enumerate(row.past):
            key, value = (torch.from_numpy(array)[None].to(model.dtype) for array in pair)
            DynamicCache.update(cache, key, value, layer)  # as it is
        with torch.no_grad():
            output = model(torch.tensor([list(row.tokens)]), past_key_values=cache, use_cache=True)
        new = slice(-len(row.tokens), None)
        layers = cached_layers(cache)
        keys = torch.stack([layer.keys[0, :, new] for layer in layers if layer.keys is not None])
        values = torch.stack([layer.values[0, :, new] for layer in layers if layer.values is not None])
        return Forward(*(tensor.double().numpy() for tensor in (output.logits[0], keys, values)))

    def _all(self, model: Any, batch: Batch) -> dict[str, Floats]:
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.position_ids is not None:
            given["position_ids"] = batch.position_ids
        with torch.no_grad():
            output = model(
                **{name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in given.items()},
                use_cache=False,
                output_hidden_states=True,
                output_attentions=True,
            )
        found = {name: output[name] for name in self._task.outputs}
        found |= {hidden_states_name(index): state for index, state in enumerate(output.hidden_states)}
        found |= {attentions_name(layer): weights for layer, weights in enumerate(output.attentions)}
        return {name: tensor.double().numpy() for name, tensor in found.items()}

    def _one_by_one(self, model: Any, batch: Batch) -> dict[str, Floats]:
        """Each row alone, its token-level outputs put where its real tokens are in the batch."""
        real = batch.attention_mask != 0
        outputs = [self._all(model, row) for row in batch.rows()]
        return {name: _scatter([given[name][0] for given in outputs], real) for name in outputs[0]}


def _scatter(rows: Sequence[Floats], real: NDArray[np.bool_]) -> Floats:
    """Rows of unequal length as one batch: [sequence, hidden] and [heads, sequence, sequence] padded as the row is."""
    batch = []
    for row, kept in zip(rows, real, strict=True):
        token_axes = {2: (0,), 3: (1, 2)}.get(row.ndim, ())
        padded = np.zeros([len(kept) if axis in token_axes else size for axis, size in enumerate(row.shape)])
        places = (np.flatnonzero(kept) if axis in token_axes else np.arange(n) for axis, n in enumerate(row.shape))
        padded[np.ix_(*places)] = row
        batch.append(padded)
    return np.stack(batch)
