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
from numpy.typing import NDArray

from exporter.calibrated import Calibrated
from exporter.calibration import PRODUCTS, Calibration, LayerActivations, RoundedStream
from exporter.checkpoint import Checkpoint
from exporter.fp16_range import keep_in_range
from exporter.gptq import Coded, Run, gptq, make_up, runs_of
from exporter.kv_scales import layer_scales
from exporter.parameters import EMBEDDING, HEAD, LAYERS, weight_source
from exporter.recipe import Precision
from exporter.rounding import BlockRounding, Rounding
from exporter.scale_search import search
from exporter.scaling import CONTEXT, DOWN, QKV, READS, UP, Scaling, per_query_head
from exporter.spec import NemotronSpec
from runtime import measured
from runtime.cache_scales import CacheScales
from runtime.session import Ints

# The matrices that read a layer's channels, in the order in which they run.
_READERS = {channels: tuple(name for name, read in READS.items() if read == channels) for channels in PRODUCTS}

ROUNDED = "rounded"
ROWS = 4096  # of a matrix whose codes are chosen at once

Tensor = torch.Tensor
Array = NDArray[np.float32]
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
    return _Run(checkpoint, precision, sample, scratch, norm_handed_out).all(progress)


class _Run:
    def __init__(
        self, checkpoint: Checkpoint, precision: Precision, sample: Sample, scratch: Path, norm_handed_out: bool
    ) -> None:
        self._norm_handed_out = norm_handed_out
        self._checkpoint, self._precision, self._scratch = checkpoint, precision, scratch / ROUNDED
        self._sample, self._calibration = sample, Calibration(checkpoint, sample.tokens)
        self._factors: dict[str, Tensor] = {}
        self._scaling = Scaling(checkpoint.spec, self._factors)
        self._rounded: dict[str, Path] = {}
        self._stream = RoundedStream(self._calibration, self._looked_up) if precision.gptq else None

    def all(self, progress: Progress) -> Calibrated:
        """Every layer, then the head."""
        total = self._checkpoint.spec.layers
        ranges: list[measured.LayerRange] = []
        cache: list[tuple[Array, Array]] = []
        for layer in self._calibration.layers():
            ranges += self._scale(layer)
            if self._precision.kv_cache is not None:
                cache.append(self._cache_scales(layer))
            if self._stream is not None:
                self._round_layer(layer, self._stream)
            progress("calibration", layer.layer + 1, total)
            del layer  # before the next is read
        if self._precision.scaling or self._precision.gptq:
            self._head()
        record = measured.Calibration(
            text=self._sample.text,
            tokens=self._sample.tokens.size,
            seed=self._sample.seed,
            methods=self._precision.calibrated,
            ranges=tuple(ranges),
        )
        scales = CacheScales(*(np.stack(side) for side in zip(*cache, strict=True))) if cache else None
        return Calibrated(self._scaling, self._rounded, scales, record)

    def _scale(self, layer: LayerActivations) -> list[measured.LayerRange]:
        """Choose the layer's factors."""
        prefix, ranges = f"{LAYERS}{layer.layer}.", []
        factors = self._search(layer, prefix) if self._precision.scaling else {}
        if self._precision.ranged:
            safe = keep_in_range(layer, factors, self._scaling)
            factors, ranges = safe.factors, [safe.range]
        self._factors |= {f"{prefix}{channels}": factor.contiguous() for channels, factor in factors.items()}
        return ranges

    def _cache_scales(self, layer: LayerActivations) -> tuple[Array, Array]:
        """Of the layer's cache, whose values are divided by their factors."""
        keys, values = layer_scales(layer, self._checkpoint.spec.rotary_dim)
        factor = self._scaling.of_values(layer.layer)
        return keys, values if factor is None else values / factor[:, 0].numpy()

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

    def _round_layer(self, layer: LayerActivations, stream: RoundedStream) -> None:
        """Round its matrices one after the other, each by what it reads once those before it are rounded."""
        prefix = f"{LAYERS}{layer.layer}."
        for channels, readers in _READERS.items():
            read = stream.inputs(layer.module, channels)
            weights = {f"{prefix}{name}.weight": layer.weights[f"{name}.weight"] for name in readers}
            self._round(weights, layer.inputs[channels], read)
        stream.advance(layer.module)

    def _head(self) -> None:
        """The vocabulary's head, unless it is the embedding too, whose rows are looked up as they are."""
        if self._checkpoint.spec.tied:
            return
        exact = self._calibration.head_input(self._calibration.hidden)
        weight = self._checkpoint.read(weight_source(HEAD, self._checkpoint)).clone()
        rounded = self._roundings({HEAD.removesuffix(".weight"): weight}, "")
        if self._precision.scaling and rounded and not self._norm_handed_out:
            self._factors[HEAD.removesuffix(".weight")] = search(rounded, exact)
        if self._stream is not None:
            rounding = self._precision.rounding(HEAD)
            if rounding is not None and rounding.precision == "int4":
                runs = runs_of(exact, self._calibration.head_input(self._stream.hidden), self._scaling.of_columns(HEAD))
                self._choose_codes(HEAD, weight, runs, cast("BlockRounding", rounding))

    def _roundings(self, matrices: Mapping[str, Tensor], prefix: str) -> list[tuple[Tensor, Rounding]]:
        """Those that are rounded, and how."""
        pairs = [(weight, self._precision.rounding(f"{prefix}{name}.weight")) for name, weight in matrices.items()]
        return [(weight, rounding) for weight, rounding in pairs if rounding is not None]

    def _round(self, weights: Mapping[str, Tensor], exact: Tensor, read: Tensor) -> None:
        """Round those that are to be, of matrices that read the same; each is overwritten with what it has become."""
        chosen = {name: rounding for name in weights if (rounding := self._precision.rounding(name)) is not None}
        if not chosen:
            return
        runs = runs_of(exact, read, self._scaling.of_columns(next(iter(chosen))))
        for name, rounding in chosen.items():
            if rounding.precision == "int4":
                self._choose_codes(name, weights[name], runs, cast("BlockRounding", rounding))
            else:  # of more bits the nearest are near enough, and are found when they are written
                nearest = rounding.nearest(self._scaling.apply(name, weights[name].float()))
                weights[name].copy_(self._scaling.undo(name, nearest))

    def _choose_codes(self, name: str, weight: Tensor, runs: list[Run], rounding: BlockRounding) -> None:
        """Round a matrix by what it multiplies, some rows at a time, and put what it has become in its place."""
        pieces = []
        for start in range(0, len(weight), ROWS):
            part = slice(start, start + ROWS)
            matrix = self._scaling.apply(name, weight[part].float().clone(), part)
            make_up(matrix, runs)
            pieces.append(gptq(matrix, runs, rounding))
            weight[part] = self._scaling.undo(name, matrix, part).to(weight.dtype)
        self._scratch.mkdir(exist_ok=True)
        self._rounded[name] = self._scratch / f"{len(self._rounded)}.npz"
        np.savez(self._rounded[name], **cast("dict[str, Any]", Coded.joined(pieces).pack(rounding)))

    def _looked_up(self, rows: Tensor) -> Tensor:
        """What rows of the embedding are rounded to."""
        rounding = self._precision.rounding(EMBEDDING) if self._precision.embedding else None
        return rows if rounding is None else rounding.nearest(rows)


def _per_kv_head(channels: Tensor, spec: NemotronSpec) -> Tensor:
    """The mean over the query heads that read a key/value head, [heads · head_dim] → [kv_heads · head_dim]."""
    return channels.reshape(spec.kv_heads, -1, spec.head_dim).mean(1).reshape(-1)
