"""Factors that move between a model's weights and leave its function as it is.

Each is of the channels that a product reads: its columns are multiplied by the factor, and what makes the channel is
divided by it: the norm's weight and bias; the rows of `v_proj` (a channel of a key/value head is read once for each of
its query heads, and has one factor); the rows of `up_proj`, for relu²(s·x) = s²·relu²(x) by the factor's square root.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.parameters import BASE, HEAD, LAYERS
from exporter.spec import NemotronSpec

if TYPE_CHECKING:
    import torch

SCALING = "scaling.safetensors"  # a file of the bundle
QKV, CONTEXT, UP, DOWN = "self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"
_HEAD = HEAD.removesuffix(".weight")
WHOLE = slice(None)
# A module of a layer → the channels that its columns read, and those that its rows make.
READS = {
    "self_attn.q_proj": QKV,
    "self_attn.k_proj": QKV,
    "self_attn.v_proj": QKV,
    "self_attn.o_proj": CONTEXT,
    "mlp.up_proj": UP,
    "mlp.down_proj": DOWN,
}
_MAKES = {
    "input_layernorm": QKV,
    "self_attn.v_proj": CONTEXT,
    "post_attention_layernorm": UP,
    "mlp.up_proj": DOWN,
}
# f(s·x) = s^degree · f(x) for s > 0.
_DEGREES = {"relu2": 2, "relu": 1}


@dataclass(frozen=True)
class Scaling:
    """The factors of a model.

    Attributes:
        spec: of the model.
        factors: by the channels' first reader (`model.layers.0.mlp.up_proj`, `lm_head`), float32 above 0:
            [in_features], for `o_proj` [kv_heads · head_dim]. A reader that has none reads its channels as they are.
    """

    spec: NemotronSpec
    factors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def apply(self, name: str, weight: torch.Tensor, part: slice = WHOLE) -> torch.Tensor:
        """A parameter, or some of its rows, with its factors in it.

        Args:
            name: as the model has it, `model.layers.0.mlp.up_proj.weight`.
            weight: its content, a norm's with the one of LayerNorm1P added; float32 comes out where it has factors.
            part: which rows it is of.
        """
        rows, columns = self._of(name)
        if rows is not None:
            rows = rows[part]
            weight = weight.float() / (rows if weight.ndim == 1 else rows[:, None])
        return weight if columns is None else weight.float() * columns

    def undo(self, name: str, weight: torch.Tensor, part: slice = WHOLE) -> torch.Tensor:
        """A parameter, or some of its rows, without the factors that are in it; the inverse of `apply`."""
        rows, columns = self._of(name)
        if columns is not None:
            weight = weight.float() / columns
        if rows is None:
            return weight
        return weight.float() * (rows[part] if weight.ndim == 1 else rows[part, None])

    def of_values(self, layer: int) -> torch.Tensor | None:
        """What a layer's values are divided by, float32 [kv_heads, 1, head_dim]; None where they are as they were."""
        factor = self.factors.get(f"{LAYERS}{layer}.{CONTEXT}")
        return None if factor is None else factor.reshape(self.spec.kv_heads, 1, self.spec.head_dim)

    def of_columns(self, name: str) -> torch.Tensor | None:
        """What a matrix's columns are multiplied with, float32 [in_features]; None where they are as they were."""
        return self._of(name)[1]

    def changes(self, name: str) -> bool:
        """Whether a parameter has factors."""
        return any(factor is not None for factor in self._of(name))

    @property
    def degree(self) -> int | None:
        """Of the activation, where factors pass through it."""
        return _DEGREES.get(self.spec.activation)

    def save(self, directory: Path) -> None:
        """Write the factors into a bundle's directory."""
        from safetensors.torch import save_file

        save_file(dict(self.factors), directory / SCALING)

    @classmethod
    def load(cls, directory: Path, spec: NemotronSpec) -> Scaling:
        """Those of a bundle; none where it has no such file."""
        from safetensors.torch import load_file

        path = directory / SCALING
        return cls(spec, load_file(path) if path.is_file() else {})

    def _of(self, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What a parameter's rows are divided by and its columns multiplied with."""
        module, _, parameter = name.rpartition(".")
        if module == _HEAD:
            return None, self.factors.get(_HEAD)
        if module == f"{BASE}norm":
            return self.factors.get(_HEAD), None
        if not module.startswith(LAYERS):
            return None, None
        index, inner = module.removeprefix(LAYERS).split(".", 1)
        rows = columns = None
        if parameter == "weight" and inner in READS:
            columns = self._factor(index, READS[inner], read=True)
        if inner in _MAKES:
            rows = self._factor(index, _MAKES[inner], read=False)
        return rows, columns

    def _factor(self, layer: str, channels: str, *, read: bool) -> torch.Tensor | None:
        factor = self.factors.get(f"{LAYERS}{layer}.{channels}")
        if factor is None:
            return None
        if channels == CONTEXT and read:
            return per_query_head(factor, self.spec)
        if channels == DOWN and not read:
            return factor.sqrt() if self.degree == 2 else factor
        return factor


def per_query_head(factor: torch.Tensor, spec: NemotronSpec) -> torch.Tensor:
    """[kv_heads · head_dim] of values as [heads · head_dim] of the context that query heads make of them."""
    shaped = factor.reshape(spec.kv_heads, 1, spec.head_dim)
    return shaped.expand(spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim).reshape(-1)
