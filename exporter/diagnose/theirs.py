"""transformers' own layers with hooks at every tap, given any residual stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.models.nemotron.modeling_nemotron import apply_rotary_pos_emb

from exporter.checkpoint import Checkpoint
from exporter.diagnose import taps
from exporter.diagnose.ours import Taps
from exporter.layered_reference import LayeredReference, Weights
from exporter.reference import Row
from runtime.cache_scales import CacheScales

Tensor = torch.Tensor

# Tap → the module that gives it, or that reads it.
_GIVEN_BY = {
    taps.NORM: "input_layernorm",
    taps.Q: "self_attn.q_proj",
    taps.K: "self_attn.k_proj",
    taps.V: "self_attn.v_proj",
    taps.ATTENDED: "self_attn.o_proj",
    taps.MLP_NORM: "post_attention_layernorm",
    taps.UP: "mlp.up_proj",
    taps.DOWN: "mlp.down_proj",
}
_READ_BY = {
    taps.CONTEXT: "self_attn.o_proj",
    taps.MIDDLE: "post_attention_layernorm",
    taps.HIDDEN: "mlp.down_proj",
}


class TransformersRun:
    """One row on its way through transformers' layers in one dtype."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights, tokens: list[int], dtype: torch.dtype) -> None:
        """Look the tokens up."""
        self._rows = LayeredReference(checkpoint, weights, [tokens], dtype)
        self._dtype, self._head_dim = dtype, checkpoint.spec.head_dim

    @property
    def hidden(self) -> Tensor:
        """The residual stream, float64 [tokens, hidden]."""
        return self._rows.hidden[0].double()

    @hidden.setter
    def hidden(self, given: Tensor) -> None:
        self._rows.hidden = [given.to(self._dtype)]

    @property
    def parameter_names(self) -> list[str]:
        """Those of a layer, within it."""
        return self._rows.parameter_names

    @property
    def frequencies(self) -> tuple[Tensor, float]:
        """Radians per position of each pair of channels, float64 [rotary_dim / 2], and the factor of what rotates."""
        rotary = self._rows.rotary
        return rotary.inv_freq.double(), float(rotary.attention_scaling)

    def advance(self, stored: Mapping[str, Tensor], row: Row, scales: CacheScales | None) -> Taps:
        """Run the row through a layer; its taps."""
        found: dict[str, Any] = {}
        layer = self._rows.decoder_layer
        hooks = [
            *(layer.get_submodule(name).register_forward_hook(_give(found, tap)) for tap, name in _GIVEN_BY.items()),
            *(layer.get_submodule(name).register_forward_pre_hook(_read(found, tap)) for tap, name in _READ_BY.items()),
            layer.self_attn.register_forward_pre_hook(_rotation(found), with_kwargs=True),
        ]
        ((keys, values),) = self._rows.advance(stored, [row], scales)
        for hook in hooks:
            hook.remove()
        cos, sin = found.pop("rotation")
        query, key = (found[tap].unflatten(-1, (-1, self._head_dim)).transpose(1, 2) for tap in (taps.Q, taps.K))
        rotated, _ = apply_rotary_pos_emb(query, key, cos, sin)  # type: ignore[no-untyped-call]
        cached = {tap: torch.from_numpy(kept) for tap, kept in ((taps.K_CACHED, keys), (taps.V_CACHED, values))}
        return {
            **{tap: value[0].double() for tap, value in found.items()},
            taps.Q_ROTATED: rotated[0].double().transpose(0, 1),
            **{tap: kept.double().transpose(0, 1) for tap, kept in cached.items()},
            taps.OUTPUT: self.hidden,
        }

    def final_norm(self) -> Tensor:
        """What the head reads, float64 [tokens, hidden]."""
        return self._rows.finish()[0].double()

    def logits(self, normed: Tensor, matrix: Tensor) -> Tensor:
        """Logits, float64 [tokens, n], by some rows of the head's matrix."""
        return self._rows.logits(normed.to(self._dtype), matrix).double()


def _give(found: dict[str, Any], tap: str) -> Callable[..., None]:
    def hook(_module: Any, _given: Any, output: Tensor) -> None:
        found[tap] = output

    return hook


def _read(found: dict[str, Any], tap: str) -> Callable[..., None]:
    def hook(_module: Any, given: tuple[Tensor, ...]) -> None:
        found[tap] = given[0]

    return hook


def _rotation(found: dict[str, Any]) -> Callable[..., None]:
    def hook(_module: Any, _given: Any, named: dict[str, Any]) -> None:
        found["rotation"] = named["position_embeddings"]

    return hook
