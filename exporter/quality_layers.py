"""What a bundle's precision costs, measured in bounded memory: windows of a text go through layers side by side.

Logits are never whole: what is made of them is summed over runs of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from exporter.checkpoint import Checkpoint
from exporter.evaluate.segments import Segments
from exporter.layered_reference import LayeredReference, Weights
from exporter.layered_steps import LayeredSteps
from exporter.memory import release
from exporter.parameters import HEAD
from exporter.quality import Doubles, Tally
from exporter.reference import Row
from exporter.verify_steps import Request
from runtime.bundle import Bundle
from runtime.errors import CheckFailed
from runtime.measured import Quality
from runtime.session import Floats, Ints

Progress = Callable[[str, int, int], None]


def measure_layers(
    bundle: Bundle,
    checkpoint: Checkpoint,
    windows: Ints,
    *,
    text: str,
    kernels: bool,
    progress: Progress = lambda *_: None,
) -> Quality:
    """Measure as `exporter.quality.measure` does, with one layer of either side in memory at a time.

    Args:
        bundle: of text generation with a cache.
        checkpoint: what it was made from.
        windows: token ids int64 [n, length], length at least 2.
        text: the file name that the record carries.
        kernels: run ONNX Runtime's kernels instead of the evaluation.
        progress: called with "quality", the layers done and their number, the head counted as one.

    Raises:
        CheckFailed: a logit is not finite, or a figure is not.
    """
    segments, weights = Segments(bundle, evaluate=not kernels), Weights(checkpoint, {})
    count, length = windows.shape
    asked = [
        Request("window", window[None], np.array([length]), np.array([0]), np.array([slot]), length)
        for slot, window in enumerate(windows)
    ]
    ours = LayeredSteps(bundle, segments, asked, slots=count, capacity=length)
    exact = LayeredReference(checkpoint, weights, windows.tolist(), torch.float32)
    for layer in range(segments.layers):
        progress("quality", layer, segments.layers + 1)
        ours.advance(segments.layer(layer), layer, ours.cache(layer))
        stored = {name: tensor.float() for name, tensor in weights.layer(layer, exact.parameter_names).items()}
        exact.advance(stored, [Row([])] * count)
        del stored
        release()
    progress("quality", segments.layers, segments.layers + 1)

    normed = exact.finish()
    sums = [_Sums(window) for window in windows]
    for part, segment in segments.head(checkpoint.spec.hidden):
        matrix = weights.read(HEAD, part)
        for index, _, logits in ours.logits(segment):
            sums[index].add(part.start, exact.logits(normed[index], matrix).numpy(), logits[0])
    tally = Tally()
    for index, window in enumerate(sums):
        window.note(tally, f"window {index}")
    return tally.quality(text, windows.size)


@dataclass
class _Softmax:
    """What a softmax over a vocabulary needs, as far as it has been seen: per position float64 [length].

    Attributes:
        most, best: the largest logit and its token.
        total: the sum of exp(logit − most).
        following: the logit of the next token.
    """

    most: Doubles
    best: Ints
    total: Doubles
    following: Doubles

    @classmethod
    def of(cls, length: int) -> _Softmax:
        """Of nothing yet."""
        return cls(np.full(length, -np.inf), np.zeros(length, np.int64), np.zeros(length), np.zeros(length))

    def add(self, start: int, logits: Doubles, following: Ints) -> Doubles:
        """Take in logits [length, n] of tokens from `start` on; what older sums are to be multiplied with."""
        rows = np.arange(len(logits))
        largest = logits.argmax(1)
        most = np.maximum(self.most, logits[rows, largest])
        self.best = np.where(logits[rows, largest] > self.most, start + largest, self.best)
        older: Doubles = np.exp(self.most - most)
        self.most, self.total = most, self.total * older + np.exp(logits - most[:, None]).sum(1)
        here = np.flatnonzero((following >= start) & (following < start + logits.shape[1]))
        self.following[here] = logits[here, following[here] - start]
        return older

    @property
    def log_total(self) -> Doubles:
        """log Σ exp(logit)."""
        result: Doubles = self.most + np.log(self.total)
        return result


@dataclass
class _Sums:
    """Both sides' logits of one window, summed as `Tally` wants them.

    With p and q the logits of reference and bundle, KL = Σ eᵖ(p − q) / Σ eᵖ − log Σ eᵖ + log Σ e^q.
    """

    window: Ints
    exact: _Softmax = field(init=False)
    ours: _Softmax = field(init=False)
    difference: Doubles = field(init=False)
    finite: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        length = len(self.window)
        self.exact, self.ours = _Softmax.of(length), _Softmax.of(length)
        self.difference, self.finite = np.zeros(length), np.ones(2, bool)

    def add(self, start: int, exact: Floats, ours: Floats) -> None:
        """Take in logits float32 [length, n] of tokens from `start` on."""
        p, q = exact.astype(np.float64), ours.astype(np.float64)
        self.finite &= [bool(np.isfinite(p).all()), bool(np.isfinite(q).all())]
        if not self.finite.all():
            return
        following = np.append(self.window[1:], -1)
        older = self.exact.add(start, p, following)
        self.ours.add(start, q, following)
        self.difference = self.difference * older + (np.exp(p - self.exact.most[:, None]) * (p - q)).sum(1)

    def note(self, tally: Tally, where: str) -> None:
        """Give a tally what was made of the window.

        Raises:
            CheckFailed: a logit is not finite.
        """
        for name, finite in zip(("transformers", "the bundle"), self.finite, strict=True):
            if not finite:
                raise CheckFailed(f"{where} of the text: logits of {name} are not finite; see verify for where from")
        log_p, log_q = self.exact.log_total, self.ours.log_total
        tally.note(
            surprise=(log_q - self.ours.following)[:-1],
            reference_surprise=(log_p - self.exact.following)[:-1],
            divergence=self.difference / self.exact.total - log_p + log_q,
            agreement=self.exact.best == self.ours.best,
        )
