"""What the generation loop needs of a backend, and the one place that chooses it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.errors import UserError

BACKENDS = ("auto", "onnxruntime")
DEVICES = ("cpu", "cuda")

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Session(Protocol):
    """A loaded model and a cache of `slots` rows of `capacity` tokens, allocated once, updated in place.

    Attributes:
        backend: what runs the graph, as in results: `onnxruntime-cpu`.
        version: of the backend's library.
        device: the hardware it runs on, in words that change when the hardware or its driver does.
        slots: rows of the cache.
        capacity: tokens per row.
        vocab_size: token ids are 0..vocab_size-1.
    """

    backend: str
    version: str
    device: str
    slots: int
    capacity: int
    vocab_size: int

    def step(self, tokens: Ints, lengths: Ints, past_lengths: Ints, slots: Ints | None = None, keep: int = 1) -> Floats:
        """Append tokens to the cache and return logits.

        Args:
            tokens: int64 [batch, sequence], each row's real tokens first, anything after them.
            lengths: int64 [batch], real tokens of each row within `tokens`, at least 1.
            past_lengths: int64 [batch], tokens of each row that the cache already holds.
            slots: int64 [batch], the cache rows used, each once (default: the first `batch`).
            keep: how many of each row's last real positions want logits. A row with fewer real tokens
                repeats its first position.

        Returns:
            float32 [batch, keep, vocab], the caller's own.

        Raises:
            UserError: a row would pass the capacity, or a token id is outside the vocabulary.
        """
        ...

    def reopen(self, *, slots: int, capacity: int) -> Self:
        """A session on the same loaded weights with a cache of its own, of other dimensions.

        Raises:
            UserError: the capacity passes the bundle's `max_length`.
        """
        ...


def open_session(
    bundle: str | Path | Bundle,
    *,
    backend: str = "auto",
    device: str = "cpu",
    slots: int = 1,
    capacity: int | None = None,
    threads: int | None = None,
) -> Session:
    """Load a bundle's model on a backend.

    Args:
        bundle: the bundle, or its directory.
        backend: one of BACKENDS; `auto` takes the best the machine and the bundle have.
        device: `cpu` or `cuda`.
        slots: rows of the cache, the largest batch a step can take.
        capacity: tokens per row (default and maximum: the bundle's `max_length`).
        threads: threads within an operator (default: the backend's own choice).

    Raises:
        UserError: unknown backend or device, a capacity beyond the bundle's, or a backend not installed.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if device not in DEVICES:
        raise UserError(f"unknown device {device!r}; known: {', '.join(DEVICES)}")
    from runtime.ort_session import OrtSession

    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    return OrtSession(opened, device=device, slots=slots, capacity=capacity, threads=threads)
