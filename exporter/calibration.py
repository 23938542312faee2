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
from exporter.trace import cached_layers
from exporter.weights import BASE, EMBEDDING, LAYERS, weight_source
from runtime.errors import CheckFailed
from runtime.session import Ints

# Keys and values read as queries do.
PRODUCTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class LayerActivations:
    """What a decoder layer's products read and gave on every token of the calibration text, float32.

    Attributes:
        layer: its index.
        inputs: what each of `PRODUCTS` read [tokens, in_features].
        keys, values: what it would cache, keys rotated [tokens, kv_heads, head_dim].
        peaks: the largest magnitude of what each module gave, and of the residual stream.
    """

    layer: int
    inputs: dict[str, torch.Tensor]
    keys: torch.Tensor
    values: torch.Tensor
    peaks: dict[str, float]


@dataclass(frozen=True)
class FinalActivations:
    """What the vocabulary's head read, float32 [tokens, hidden], and the residual stream's largest magnitude."""

    head_input: torch.Tensor
    peak: float


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

    def final(self) -> FinalActivations:
        """What the head reads, once every layer has run."""
        norm = self._module(NemotronLayerNorm1P(self._config.hidden_size, eps=self._config.norm_eps), f"{BASE}norm.")
        with torch.no_grad():
            return FinalActivations(norm(self._hidden).flatten(0, 1), float(self._hidden.abs().max()))

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
        recorder.peaks["residual stream"] = float(self._hidden.abs().max())
        return LayerActivations(index, recorder.inputs, torch.cat(keys), torch.cat(values), recorder.peaks)

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
        self.peaks: dict[str, float] = {}
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
            self.peaks[name] = max(self.peaks.get(name, 0.0), float(given.abs().max()))

        return hook
