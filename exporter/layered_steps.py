"""Steps of a session on their way through a bundle's graph, a decoder layer at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from exporter.evaluate.segments import Segment, Segments
from exporter.evaluate.session import EvaluatedCache
from exporter.evaluate.tensors import as_torch
from exporter.verify_steps import Request
from runtime.bundle import Bundle
from runtime.contract import LOGITS
from runtime.session import Floats
from runtime.steps import Limits, Step, contract_of

Tensor = torch.Tensor


@dataclass
class _Run:
    """Rows of a step that the graph takes at once, and how far they have come.

    Attributes:
        request: which step it is of.
        rows: which of its rows.
        step: these rows, without what is padding in all of them.
        feeds: what the graph takes, but for the cache.
        hidden: the residual stream, [rows, tokens, hidden].
        kept: whether it has the columns alone whose logits are asked for, of every token.
    """

    request: int
    rows: slice
    step: Step
    feeds: Mapping[str, Tensor]
    hidden: Tensor
    kept: bool = False

    @property
    def slots(self) -> slice:
        """The cache's rows."""
        return slice(int(self.step.slots[0]), int(self.step.slots[0]) + len(self.step.slots))


class LayeredSteps:
    """What `EvaluatedSession` runs step by step, here layer by layer: all steps must be known from the start.

    Attributes:
        requests: the steps, in order.
    """

    def __init__(
        self, bundle: Bundle, segments: Segments, requests: Sequence[Request], *, slots: int, capacity: int
    ) -> None:
        """Check the steps and look their tokens up."""
        limits = Limits(slots, capacity, bundle.vocab_size, bundle.manifest.max_length)
        contract, embedding = contract_of(bundle), segments.embedding()
        self.requests, self._bundle, self._segments = requests, bundle, segments
        self._slots, self._capacity = slots, capacity
        self._runs = []
        for index, asked in enumerate(requests):
            step = limits.checked(asked.tokens, asked.lengths, asked.past, asked.slots, asked.keep)
            for rows in contract.split(step, capacity):
                part = step.rows(rows)
                feeds = {name: as_torch(array) for name, array in contract.feeds(part).items()}
                hidden = embedding.run(feeds)[segments.stream_name(0)]
                self._runs.append(_Run(index, rows, part, feeds, hidden))

    def cache(self, layer: int) -> EvaluatedCache:
        """An empty cache of one layer, to be given to `advance`."""
        return EvaluatedCache(self._bundle.cache_geometry, self._slots, self._capacity, only=layer)

    def advance(self, segment: Segment, layer: int, cache: EvaluatedCache) -> None:
        """Run every step through a layer."""
        here, after = self._segments.stream_name(layer), self._segments.stream_name(layer + 1)
        for run in self._runs:
            past = {name: tensor[run.slots] for name, tensor in cache.tensors.items()}
            outputs = segment.run({**run.feeds, **past, here: run.hidden})
            cache.update(layer, run.slots, outputs)
            run.hidden = outputs[after]
            run.kept = self._segments.ends_kept and layer + 1 == self._segments.layers

    def hidden(self) -> list[Floats]:
        """The residual stream of each slot's new tokens as far as layers have run, float32 [tokens, hidden]."""
        found: list[list[Floats]] = [[] for _ in range(self._slots)]
        for run in self._runs:
            for row, slot in enumerate(run.step.slots):
                length = int(run.step.lengths[row])
                # Padding is behind a row's tokens; ahead of them in what is kept for logits.
                new = slice(-length, None) if run.kept else slice(length)
                found[int(slot)].append(run.hidden[row, new].float().numpy())
        return [np.concatenate(parts) for parts in found]

    def logits(self, segment: Segment) -> Iterator[tuple[int, slice, Floats]]:
        """Run every step through the head, or some of its vocabulary.

        Yields:
            Which step, which of its rows, and their logits, float32 [rows, keep, n].
        """
        here = self._segments.stream_name(self._segments.layers)
        for run in self._runs:
            yield run.request, run.rows, segment.run({**run.feeds, here: run.hidden})[LOGITS].float().numpy()


def all_logits(vocab: int, segments: Iterable[tuple[slice, Segment]], *through: LayeredSteps) -> list[list[Floats]]:
    """Logits of each step, float32 [batch, keep, vocab], by the head's segments, each of some of the vocabulary."""
    found = [
        [np.empty((len(asked.tokens), asked.keep, vocab), np.float32) for asked in steps.requests] for steps in through
    ]
    for part, segment in segments:
        for steps, into in zip(through, found, strict=True):
            for index, rows, logits in steps.logits(segment):
                into[index][rows, :, part] = logits
    return found
