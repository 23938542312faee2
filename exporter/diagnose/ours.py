"""A bundle's graph on its way through one row, a layer at a time, with every tap of it.

The row is a prefill and then single tokens, so that what is wrong only after a past shows too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import torch

from exporter.diagnose import taps
from exporter.evaluate.segments import Segments
from exporter.evaluate.session import EvaluatedCache, network_programs
from exporter.evaluate.tensors import as_torch
from exporter.parameters import HEAD, LAYERS
from exporter.rounded_cache import CacheView
from exporter.scaling import Scaling
from runtime.bundle import Bundle
from runtime.contract import LOGITS, past_names, present_names
from runtime.manifest import MODEL
from runtime.steps import Step, contract_of

Tensor = torch.Tensor
Taps = dict[str, Tensor]  # float64 [tokens, …], by the names of `exporter.diagnose.taps`

SINGLE = 2  # tokens at the end of the row that are steps of their own
BEYOND = 4  # positions of the cache that no token reaches

# The product of whose columns a tap's channels are; see `exporter.scaling`.
_READ_BY = {
    taps.NORM: "self_attn.q_proj",
    taps.CONTEXT: "self_attn.o_proj",
    taps.MLP_NORM: "mlp.up_proj",
    taps.HIDDEN: "mlp.down_proj",
}


@dataclass
class _Run:
    """A step: its first position, the graph's inputs but for the cache, and the residual stream [1, tokens, hidden]."""

    start: int
    count: int
    feeds: Mapping[str, Tensor]
    hidden: Tensor


class BundleRun:
    """One row on its way through a bundle.

    Attributes:
        name: what runs it, and its version.
        steps: the first position and the number of tokens of each step.
        kept: this layer's keys and values as the cache has them, float32 [kv_heads, tokens, head_dim].
    """

    def __init__(self, bundle: Bundle, scaling: Scaling, tokens: list[int], *, network: bool = False) -> None:
        """Find the taps and look the tokens up.

        Raises:
            UserError: the graph has no decoder layers that can be told apart, or no TensorRT is installed.
        """
        self._bundle, self._scaling, self._view = bundle, scaling, CacheView(bundle, scaling)
        self._tokens = len(tokens)
        self._capacity = min(len(tokens) + BEYOND, bundle.manifest.max_length)
        model = ir.load(bundle.file(MODEL))
        program = None
        if network:
            name, version, programs = network_programs(bundle)
            program = (f"{name} {version}", programs(self._capacity))
        evaluate = network or bundle.manifest.precision != "fp32"
        self._segments = Segments(bundle, evaluate=evaluate, model=model, network=program)
        streams = [self._segments.stream_name(layer) for layer in range(self._segments.layers + 1)]
        self._taps, self._final_norm = taps.find_taps(model.graph, streams), taps.final_norm(model.graph)
        self.name = self._segments.name
        single = min(SINGLE, len(tokens) - 1)
        cuts = [0, *range(len(tokens) - single, len(tokens) + 1)]
        self.steps = [(start, end - start) for start, end in pairwise(cuts)]
        embedding = self._segments.embedding()
        self._runs = []
        for start, count in self.steps:
            given = np.array([tokens[start : start + count]], np.int64)
            step = Step(given, np.array([count]), np.array([start]), np.array([0]), count)
            feeds = {name: as_torch(array) for name, array in contract_of(bundle).feeds(step).items()}
            self._runs.append(_Run(start, count, feeds, embedding.run(feeds)[streams[0]]))
        self.kept: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def hidden(self) -> Tensor:
        """The residual stream as far as layers have run, float64 [tokens, hidden]."""
        return torch.cat([run.hidden[0] for run in self._runs]).double()

    def advance(self, layer: int) -> Taps:
        """Run every step through a layer; its taps, in the channels of the checkpoint's model."""
        own = self._taps[layer]
        after = self._segments.stream_name(layer + 1)
        names = list(dict.fromkeys([after, *present_names(layer), *own.values()]))
        segment = self._segments.between(self._segments.stream_name(layer), names)
        cache = EvaluatedCache(self._bundle.cache_geometry, 1, self._capacity, only=layer)
        found: dict[str, list[Tensor]] = {tap: [] for tap in own}
        for run in self._runs:
            here = {self._segments.stream_name(layer): run.hidden, taps.PROBE_PAST: self._empty(run.hidden.dtype)}
            past = {name: cache.tensors[name] for name in past_names(layer)}
            outputs = segment.run({**run.feeds, **past, **here})
            cache.update(layer, slice(0, 1), outputs)
            run.hidden = outputs[after]
            for tap, name in own.items():
                found[tap].append(self._of_step(run, outputs[name]))
        keys, values = self._view.of(cache).read(layer)
        self.kept = (keys[0, :, : self._tokens], values[0, :, : self._tokens])
        cached = {
            tap: torch.from_numpy(kept).double().transpose(0, 1)
            for tap, kept in zip((taps.K_CACHED, taps.V_CACHED), self.kept, strict=True)
        }
        ours = {tap: torch.cat(parts).double() for tap, parts in found.items()}
        return self._unscaled(layer, {**ours, **cached, taps.OUTPUT: self.hidden})

    def head(self) -> tuple[Tensor, Iterator[tuple[slice, Tensor]]]:
        """What the final norm gives, float64 [tokens, hidden], and logits [tokens, n] by runs of the vocabulary."""
        here = self._segments.stream_name(self._segments.layers)
        norm = self._segments.between(here, [self._final_norm])
        normed = torch.cat([norm.run({**run.feeds, here: run.hidden})[self._final_norm][0] for run in self._runs])
        factor = self._scaling.of_columns(HEAD)

        def logits() -> Iterator[tuple[slice, Tensor]]:
            for part, segment in self._segments.head(self._bundle.config["hidden_size"]):
                parts = [segment.run({**run.feeds, here: run.hidden})[LOGITS][0] for run in self._runs]
                yield part, torch.cat(parts).double()

        return normed.double() * (1 if factor is None else factor.double()), logits()

    def _empty(self, dtype: torch.dtype) -> Tensor:
        config, width = self._bundle.config, self._bundle.cache_geometry.head_dim
        return torch.zeros(1, config["num_attention_heads"], self._capacity, width, dtype=dtype)

    def _of_step(self, run: _Run, value: Tensor) -> Tensor:
        """What a step gave of its own tokens, [tokens, …]: heads come behind the tokens, of a cache the new positions.

        Of a prefill whose last layer keeps the columns that are asked for, these are all.
        """
        row = value[0]
        if row.ndim == 3:
            row = row.transpose(0, 1)
        return row if len(row) == run.count else row[run.start : run.start + run.count]

    def _unscaled(self, layer: int, ours: Taps) -> Taps:
        """In the channels of the checkpoint, where the bundle's have factors."""
        for tap, module in _READ_BY.items():
            factor = self._scaling.of_columns(f"{LAYERS}{layer}.{module}.weight")
            if factor is not None and tap in ours:
                ours[tap] = ours[tap] * factor.double()
                if tap == taps.HIDDEN and taps.UP in ours:
                    own = factor.double()
                    ours[taps.UP] = ours[taps.UP] * (own.sqrt() if self._scaling.degree == 2 else own)
        factor = self._scaling.of_values(layer)
        if factor is not None and taps.V in ours:
            ours[taps.V] = ours[taps.V] * factor.double().flatten()
        return ours
