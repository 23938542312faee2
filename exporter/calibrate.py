"""What a calibration text decides before weights are written: their factors, and codes chosen by what they multiply.

One pass over the layers. Of a layer, its weights in fp32 and what went through it are in memory; matrices that are
rounded here wait on disk until they are written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from exporter.calibrated import Calibrated
from exporter.calibration import Calibration, LayerActivations
from exporter.checkpoint import Checkpoint
from exporter.fp16_range import keep_in_range
from exporter.gptq import gptq, inverse_factors
from exporter.parameters import HEAD, LAYERS, weight_source
from exporter.recipe import Precision
from exporter.rounding import BlockRounding, Rounding
from exporter.scale_search import search
from exporter.scaling import CONTEXT, DOWN, QKV, UP, Scaling, per_query_head
from exporter.spec import NemotronSpec
from runtime import manifest
from runtime.session import Ints

# The matrices that read a layer's channels.
_READERS = {
    QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    CONTEXT: ("self_attn.o_proj",),
    UP: ("mlp.up_proj",),
    DOWN: ("mlp.down_proj",),
}

ROUNDED = "rounded"

Tensor = torch.Tensor
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sample:
    """The calibration text: its name, token ids [n, length] of it, and the seed that chose them."""

    text: str
    tokens: Ints
    seed: int = 0


def calibrate(
    checkpoint: Checkpoint,
    precision: Precision,
    sample: Sample,
    scratch: Path,
    progress: Progress = lambda *_: None,
    *,
    norm_handed_out: bool = False,
) -> Calibrated:
    """Run the calibration text and decide what the precision asks for.

    Args:
        checkpoint: whose weights.
        precision: which factors and codes are chosen, and how matrices are rounded.
        sample: the text.
        scratch: where a directory for rounded matrices is made.
        progress: called with "calibration", the layers done and their number.
        norm_handed_out: the graph gives what the last norm gives: it is not divided by factors of the head.

    Raises:
        UserError: a layer leaves the range of fp16 where no factor helps.
        CheckFailed: the checkpoint is not finite in fp32 on the text.
    """
    return _Run(checkpoint, precision, scratch, norm_handed_out).all(sample, progress)


class _Run:
    def __init__(self, checkpoint: Checkpoint, precision: Precision, scratch: Path, norm_handed_out: bool) -> None:
        self._norm_handed_out = norm_handed_out
        self._checkpoint, self._precision, self._scratch = checkpoint, precision, scratch / ROUNDED
        self._factors: dict[str, Tensor] = {}
        self._scaling = Scaling(checkpoint.spec, self._factors)
        self._rounded: dict[str, Path] = {}

    def all(self, sample: Sample, progress: Progress) -> Calibrated:
        """Every layer, then the head."""
        total, ranges = self._checkpoint.spec.layers, []
        calibration = Calibration(self._checkpoint, sample.tokens)
        for layer in calibration.layers():
            ranges += self._layer(layer)
            progress("calibration", layer.layer + 1, total)
        if self._precision.scaling or self._precision.gptq:
            self._head(calibration)
        record = manifest.Calibration(
            text=sample.text,
            tokens=sample.tokens.size,
            seed=sample.seed,
            methods=self._precision.calibrated,
            ranges=tuple(ranges),
        )
        return Calibrated(self._scaling, self._rounded, record)

    def _layer(self, layer: LayerActivations) -> list[manifest.LayerRange]:
        prefix = f"{LAYERS}{layer.layer}."
        factors = self._search(layer, prefix) if self._precision.scaling else {}
        ranges = []
        if self._precision.ranged:
            safe = keep_in_range(layer, factors, self._scaling)
            factors, ranges = safe.factors, [safe.range]
        self._factors |= {f"{prefix}{channels}": factor.contiguous() for channels, factor in factors.items()}
        if self._precision.gptq:
            for channels, readers in _READERS.items():
                names = {f"{prefix}{name}.weight": layer.weights[f"{name}.weight"] for name in readers}
                self._round(names, layer.inputs[channels])
        return ranges

    def _search(self, layer: LayerActivations, prefix: str) -> dict[str, Tensor]:
        """Factors by what goes through the layer, of channels whose readers are rounded.

        Those that scale rows of other readers come first: what a matrix's columns need depends on its rows.
        """
        spec = self._checkpoint.spec
        factors: dict[str, Tensor] = {}
        for channels in (CONTEXT, DOWN, QKV, UP):
            own = Scaling(spec, {f"{prefix}{known}": factor for known, factor in factors.items()})
            scaled = {
                name: own.apply(f"{prefix}{name}.weight", layer.weights[f"{name}.weight"])
                for name in _READERS[channels]
            }
            rounded, inputs = self._roundings(scaled, prefix), layer.inputs[channels]
            if not rounded or (channels == DOWN and self._scaling.degree is None):
                continue
            if channels == CONTEXT:
                pool, spread = partial(_per_kv_head, spec=spec), partial(per_query_head, spec=spec)
                factors[channels] = search(rounded, inputs, pool, spread)
            else:
                factors[channels] = search(rounded, inputs)
        return factors

    def _head(self, calibration: Calibration) -> None:
        """The vocabulary's head, unless it is the embedding too, whose rows are looked up as they are."""
        if self._checkpoint.spec.tied:
            return
        inputs = calibration.head_input()
        weight = self._checkpoint.read(weight_source(HEAD, self._checkpoint)).float()
        rounded = self._roundings({HEAD.removesuffix(".weight"): weight}, "")
        if self._precision.scaling and rounded and not self._norm_handed_out:
            self._factors[HEAD.removesuffix(".weight")] = search(rounded, inputs)
        if self._precision.gptq:
            self._round({HEAD: weight}, inputs)

    def _roundings(self, matrices: Mapping[str, Tensor], prefix: str) -> list[tuple[Tensor, Rounding]]:
        """Those that are rounded, and how."""
        pairs = [(weight, self._precision.rounding(f"{prefix}{name}.weight")) for name, weight in matrices.items()]
        return [(weight, rounding) for weight, rounding in pairs if rounding is not None]

    def _round(self, weights: Mapping[str, Tensor], inputs: Tensor) -> None:
        """Round those of one input to 4 bits; more bits need no choice of codes."""
        chosen = {name: rounding for name in weights if (rounding := self._precision.rounding(name)) is not None}
        chosen = {name: rounding for name, rounding in chosen.items() if rounding.precision == "int4"}
        if not chosen:
            return
        inverses = inverse_factors(inputs, self._scaling.of_columns(next(iter(chosen))))
        for name, rounding in chosen.items():
            matrix = self._scaling.apply(name, weights[name].clone())
            self._scratch.mkdir(exist_ok=True)
            path = self._scratch / f"{len(self._rounded)}.npz"
            np.savez(path, **cast("dict[str, Any]", gptq(matrix, inverses, cast("BlockRounding", rounding))))
            self._rounded[name] = path


def _per_kv_head(channels: Tensor, spec: NemotronSpec) -> Tensor:
    """The mean over the query heads that read a key/value head, [heads · head_dim] → [kv_heads · head_dim]."""
    return channels.reshape(spec.kv_heads, -1, spec.head_dim).mean(1).reshape(-1)
