"""What goes through a model on a calibration text: transformers' own decoder layers, one in memory at a time.

Only the layer that runs has its weights in memory, and only its activations are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
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
        module: transformers' own, a `NemotronDecoderLayer` with the checkpoint's weights in fp32.
        weights: its parameters by their names in it (`mlp.up_proj.weight`), as the checkpoint has them.
        inputs: what each of `PRODUCTS` read [tokens, in_features].
        keys, values: what it would cache, keys rotated [tokens, kv_heads, head_dim].
        peaks: the largest magnitude of each channel that each module gave, and of the residual stream (`RESIDUAL`).
    """

    layer: int
    module: Any
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

    @property
    def hidden(self) -> torch.Tensor:
        """The residual stream as far as layers have run, float32 [n, length, hidden]."""
        return self._hidden

    def head_input(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the vocabulary's head reads of a residual stream that every layer has run on, [tokens, hidden]."""
        norm = self._module(NemotronLayerNorm1P(self._config.hidden_size, eps=self._config.norm_eps), f"{BASE}norm.")
        with torch.no_grad():
            read: torch.Tensor = norm(hidden).flatten(0, 1)
        return read

    def _run(self, index: int) -> LayerActivations:
        with torch.device("meta"):
            layer = NemotronDecoderLayer(self._config, 0)
        layer = self._module(layer, f"{LAYERS}{index}.")
        recorder, kept = _Recorder(layer, self._hidden.shape[0] * self._hidden.shape[1]), []
        for row in range(len(self._hidden)):
            cache = DynamicCache()
            self._hidden[row] = self.run(layer, self._hidden[row], cache)
            kept.append(cached_layers(cache)[0])
        recorder.stop()
        if not bool(torch.isfinite(self._hidden).all()):
            raise CheckFailed(f"layer {index} is not finite in fp32 on the calibration text; the checkpoint is broken")
        recorder.peaks[RESIDUAL] = self._hidden.abs().amax((0, 1))
        keys, values = (
            torch.cat([tensor[0].transpose(0, 1) for tensor in side])
            for side in zip(*((layer.keys, layer.values) for layer in kept), strict=True)
        )
        weights = {name: parameter.data for name, parameter in layer.named_parameters()}
        return LayerActivations(index, layer, weights, recorder.inputs, keys, values, recorder.peaks)

    def run(self, layer: Any, hidden: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        """Run one window, float32 [length, hidden], through a layer."""
        with torch.no_grad():
            out: torch.Tensor = layer(
                hidden[None],
                attention_mask=self._mask,
                past_key_values=cache,
                use_cache=cache is not None,
                position_embeddings=self._rotary,
            )
        return out[0]

    def _module(self, module: Any, prefix: str) -> Any:
        """Give a module on the meta device its weights in fp32."""
        weights = {name: self._read(f"{prefix}{name}").float() for name, _ in module.named_parameters()}
        module.load_state_dict(weights, assign=True)
        return module.eval()

    def _read(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(weight_source(name, self._checkpoint))


class RoundedStream:
    """The same windows on their way through layers whose weights have been rounded."""

    def __init__(self, calibration: Calibration, embedding: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Begin where the calibration begins.

        Args:
            calibration: before any layer has run.
            embedding: what rows of the embedding, float32 [tokens, hidden], are rounded to.
        """
        self._calibration = calibration
        exact = calibration.hidden
        self.hidden = embedding(exact.flatten(0, 1)).reshape(exact.shape).clone()

    def inputs(self, layer: Any, product: str) -> torch.Tensor:
        """What a product of a layer reads, float32 [tokens, in_features], with the weights that the layer has now."""
        found: list[torch.Tensor] = []

        def stop(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            found.append(given[0][0])
            raise _ReachedError

        hook = layer.get_submodule(product).register_forward_pre_hook(stop)
        for window in self.hidden:
            with suppress(_ReachedError):
                self._calibration.run(layer, window)
        hook.remove()
        return torch.cat(found)

    def advance(self, layer: Any) -> None:
        """Run through a layer with the weights that it has now."""
        for row, window in enumerate(self.hidden):
            self.hidden[row] = self._calibration.run(layer, window)


class _ReachedError(Exception):
    """What was asked for has been seen; the rest of the layer need not run."""


class _Recorder:
    """Notes what a layer's modules read and give while it runs, window after window."""

    def __init__(self, layer: torch.nn.Module, tokens: int) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.peaks: dict[str, torch.Tensor] = {}
        self._tokens = tokens
        self._filled: dict[str, int] = {}
        self._hooks = []
        for name, module in layer.named_modules():
            if name in PRODUCTS:
                self._hooks.append(module.register_forward_pre_hook(self._reads(name)))
            if name and not list(module.children()):
                self._hooks.append(module.register_forward_hook(self._gives(name)))

    def stop(self) -> None:
        """Note no more."""
        for hook in self._hooks:
            hook.remove()

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
