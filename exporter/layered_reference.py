"""The model as transformers computes it, a decoder layer at a time: rows go through the layers side by side.

Every layer runs as transformers' own base model of that one layer, so that mask, positions, rotation and cache are its
own. Of a layer's weights, one matrix at a time is in the dtype that is computed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P, NemotronModel, NemotronRotaryEmbedding

from exporter.checkpoint import Checkpoint
from exporter.evaluate.rounded import Reader
from exporter.evaluate.tensors import WHOLE
from exporter.parameters import BASE, EMBEDDING, LAYERS, weight_source
from exporter.reference import Row
from exporter.rounded_cache import RoundedCache
from exporter.trace import cached_layers
from exporter.yardstick import Array
from runtime.cache_scales import CacheScales

Tensor = torch.Tensor
Pairs = Sequence[tuple[Array, Array]]  # of rows or layers, a key and a value


class Weights:
    """A model's parameters by name, each read when it is asked for."""

    def __init__(self, checkpoint: Checkpoint, replaced: Mapping[str, Reader]) -> None:
        """Nothing is read yet.

        Args:
            checkpoint: whose parameters.
            replaced: readers of those that others stand in for.
        """
        self._checkpoint, self._replaced = checkpoint, replaced

    def read(self, name: str, rows: slice = WHOLE) -> Tensor:
        """A parameter, or some of its rows, in the dtype that it is stored in."""
        if name in self._replaced:
            return self._replaced[name](rows)
        source = weight_source(name, self._checkpoint)
        return self._checkpoint.read_rows(source, rows)

    def layer(self, layer: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Those of a decoder layer, by their names within it."""
        return {name: self.read(f"{LAYERS}{layer}.{name}") for name in names}


class LayeredReference:
    """Rows on their way through transformers' layers, in one dtype.

    Attributes:
        hidden: the residual stream of each row as far as layers have run, [tokens, hidden].
    """

    def __init__(
        self, checkpoint: Checkpoint, weights: Weights, rows: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> None:
        """Look the tokens up.

        Args:
            checkpoint: whose configuration.
            weights: of the model.
            rows: token ids of each row.
            dtype: of weights, activations and cache.
        """
        spec = checkpoint.spec
        config = type(spec.config).from_dict({**spec.config.to_dict(), "num_hidden_layers": 1})
        config._attn_implementation = "eager"
        self._config, self._weights, self._dtype = config, weights, dtype
        tokens = sorted({int(token) for row in rows for token in row})
        looked_up = {token: weights.read(EMBEDDING, slice(token, token + 1)) for token in tokens}
        self.hidden = [torch.cat([looked_up[int(token)] for token in row]).to(dtype) for row in rows]
        with torch.device("meta"):
            self._model = NemotronModel(config)
            self._norm = NemotronLayerNorm1P(spec.hidden, eps=spec.norm_eps)
        self._model.rotary_emb = NemotronRotaryEmbedding(config=config)
        self._model.set_submodule("norm", torch.nn.Identity())
        self._model.train(False)

    @property
    def decoder_layer(self) -> Any:
        """transformers' own layer that every layer runs as, to hang hooks on."""
        return self._model.layers[0]

    @property
    def rotary(self) -> Any:
        """transformers' own rotary embedding: `inv_freq` [rotary_dim / 2] and `attention_scaling`."""
        return self._model.rotary_emb

    @property
    def parameter_names(self) -> list[str]:
        """The names of a layer's parameters within it."""
        return [name for name, _ in self._model.layers[0].named_parameters()]

    def advance(self, stored: Mapping[str, Tensor], rows: Sequence[Row], scales: CacheScales | None = None) -> Pairs:
        """Run every row through a layer.

        Args:
            stored: the layer's parameters, in any dtype.
            rows: of each row this layer's `past` and `kept`, as lists of one.
            scales: of this layer's cache, [1, kv_heads, head_dim]; None for one of the activations' dtype.

        Returns:
            Keys and values of each row's new positions, float64 [kv_heads, tokens, head_dim].
        """
        layer = self._model.layers[0]
        hooks = [_lend(module, name, stored, self._dtype) for name, module in layer.named_modules()]
        found = []
        for index, row in enumerate(rows):
            cache = DynamicCache(config=self._config) if scales is None else RoundedCache(self._config, scales, row)
            for pair in row.past:
                key, value = (torch.from_numpy(array)[None].to(self._dtype) for array in pair)
                DynamicCache.update(cache, key, value, 0)  # as it is
            new = len(self.hidden[index])
            with torch.no_grad():
                output = self._model(inputs_embeds=self.hidden[index][None], past_key_values=cache, use_cache=True)
            assert output.last_hidden_state is not None
            self.hidden[index] = output.last_hidden_state[0]
            (kept,) = cached_layers(cache)
            assert kept.keys is not None
            assert kept.values is not None
            found.append((_new(kept.keys, new), _new(kept.values, new)))
        for remove in hooks:
            remove()
        return found

    def finish(self) -> list[Tensor]:
        """What the head reads of every row, [tokens, hidden], after the final norm."""
        norm = {name: self._weights.read(f"{BASE}norm.{name}").to(self._dtype) for name in ("weight", "bias")}
        self._norm.load_state_dict(norm, assign=True)
        with torch.no_grad():
            return [self._norm(hidden) for hidden in self.hidden]

    def logits(self, normed: Tensor, matrix: Tensor) -> Tensor:
        """Logits [tokens, n] of what `finish` gave, by some rows of the head's matrix [n, hidden] in any dtype."""
        return torch.nn.functional.linear(normed, matrix.to(self._dtype))


def _new(cached: Tensor, count: int) -> Array:
    """The last positions of a cache of one row, float64 [kv_heads, count, head_dim]."""
    found: Array = cached[0, :, -count:].double().numpy()
    return found


def _lend(module: Any, name: str, stored: Mapping[str, Tensor], dtype: torch.dtype) -> Callable[[], None]:
    """Give a module its own parameters while it runs, and only then."""
    own = {key: f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)}
    absent = {key: getattr(module, key) for key in own}

    def lend(*_: Any) -> None:
        for key, full in own.items():
            setattr(module, key, torch.nn.Parameter(stored[full].to(dtype), requires_grad=False))

    def take_back(*_: Any) -> None:
        for key in own:
            setattr(module, key, absent[key])

    hooks = [module.register_forward_pre_hook(lend), module.register_forward_hook(take_back)] if own else []

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove
