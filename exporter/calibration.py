"""What goes through a model on a calibration text: transformers' own decoder layers, one in memory at a time.

Only the layer that runs has its weights in memory, and only its activations are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.nemotron.modeling_nemotron import (
    NemotronDecoderLayer,
    NemotronLayerNorm1P,
    NemotronRotaryEmbedding,
)

from exporter.checkpoint import Checkpoint
from exporter.parameters import BASE, EMBEDDING, LAYERS, weight_source
from exporter.scaling import CONTEXT, DOWN, QKV, UP
from exporter.trace import cached_layers
from runtime.errors import CheckFailed
from runtime.session import Ints

# What the products of a layer read, by the first that does: keys and values read as queries do.
PRODUCTS = (QKV, CONTEXT, UP, DOWN)
RESIDUAL = "residual stream"


@dataclass(frozen=True)
class LayerActivations:
    """What a decoder layer's products read and gave on every token of the calibration text, float32.

    Attributes:
        layer: its index.
        weights: its parameters by their names in it (`mlp.up_proj.weight`), as the checkpoint has them.
        inputs: what each of `PRODUCTS` read [tokens, in_features].
        keys, values: what it would cache, keys rotated [tokens, kv_heads, head_dim].
        peaks: the largest magnitude of each channel that each module gave, and of the residual stream (`RESIDUAL`).
    """

    layer: int
    weights: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    keys: torch.Tensor
    values: torch.Tensor
    peaks: dict[str, torch.Tensor]


class Calibration:
    """A text's windows on their way through a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, windows: Ints) -> None:
        """Look the tokens up.

        Args:
            checkpoint: whose weights.
            windows: token ids [n, length]; the windows know nothing of each other.
        """
        self._checkpoint, self._config = checkpoint, checkpoint.spec.config
        self._config._attn_implementation = "eager"
        embedding = self._read(EMBEDDING)
        self._hidden = embedding[torch.from_numpy(windows)].float()  # [n, length, hidden]
        positions = torch.arange(windows.shape[1])[None]
        self._rotary = NemotronRotaryEmbedding(config=self._config)(self._hidden[:1], positions)
        self._mask = torch.full((windows.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]

    def layers(self) -> Iterator[LayerActivations]:
        """Run the layers one after the other; each is read when it is asked for.

        Raises:
            CheckFailed: the activations are not finite in fp32.
        """
        for index in range(self._checkpoint.spec.layers):
            yield self._run(index)

    def head_input(self) -> torch.Tensor:
        """What the vocabulary's head reads once every layer has run, float32 [tokens, hidden]."""
        norm = self._module(NemotronLayerNorm1P(self._config.hidden_size, eps=self._config.norm_eps), f"{BASE}norm.")
        with torch.no_grad():
            read: torch.Tensor = norm(self._hidden).flatten(0, 1)
        return read

    def _run(self, index: int) -> LayerActivations:
        with torch.device("meta"):
            layer = NemotronDecoderLayer(self._config, 0)
        layer = self._module(layer, f"{LAYERS}{index}.")
        recorder = _Recorder(layer, self._hidden.shape[0] * self._hidden.shape[1])
        keys, values = [], []
        for row in range(len(self._hidden)):
            cache = DynamicCache()
            with torch.no_grad():
                out = layer(
                    self._hidden[row : row + 1],
                    attention_mask=self._mask,
                    past_key_values=cache,
                    use_cache=True,
                    position_embeddings=self._rotary,
                )
            self._hidden[row] = out[0]
            kept = cached_layers(cache)[0]
            assert kept.keys is not None
            assert kept.values is not None
            keys.append(kept.keys[0].transpose(0, 1))
            values.append(kept.values[0].transpose(0, 1))
        if not bool(torch.isfinite(self._hidden).all()):
            raise CheckFailed(f"layer {index} is not finite in fp32 on the calibration text; the checkpoint is broken")
        recorder.peaks[RESIDUAL] = self._hidden.abs().amax((0, 1))
        weights = {name: parameter.data for name, parameter in layer.named_parameters()}
        return LayerActivations(index, weights, recorder.inputs, torch.cat(keys), torch.cat(values), recorder.peaks)

    def _module(self, module: Any, prefix: str) -> Any:
        """Give a module on the meta device its weights in fp32."""
        weights = {name: self._read(f"{prefix}{name}").float() for name, _ in module.named_parameters()}
        module.load_state_dict(weights, assign=True)
        return module.eval()

    def _read(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(weight_source(name, self._checkpoint))


class _Recorder:
    """Notes what a layer's modules read and give while it runs, window after window."""

    def __init__(self, layer: torch.nn.Module, tokens: int) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.peaks: dict[str, torch.Tensor] = {}
        self._tokens = tokens
        self._filled: dict[str, int] = {}
        for name, module in layer.named_modules():
            if name in PRODUCTS:
                module.register_forward_pre_hook(self._reads(name))
            if name and not list(module.children()):
                module.register_forward_hook(self._gives(name))

    def _reads(self, name: str) -> Any:
        def hook(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            rows = given[0].flatten(0, -2)
            kept = self.inputs.setdefault(name, torch.empty(self._tokens, rows.shape[1]))
            start = self._filled.get(name, 0)
            kept[start : start + len(rows)] = rows
            self._filled[name] = start + len(rows)

        return hook

    def _gives(self, name: str) -> Any:
        def hook(_: torch.nn.Module, __: Any, given: torch.Tensor) -> None:
            peak = given.abs().amax((0, 1))
            self.peaks[name] = torch.maximum(self.peaks.get(name, peak), peak)

        return hook
