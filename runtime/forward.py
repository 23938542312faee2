"""Graphs without a cache: what runs one, what it is fed, and the one place that chooses the backend."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.contract import (
    ATTENTION_MASK,
    INPUT_IDS,
    INPUTS_EMBEDS,
    LOGITS_INDICES,
    LOGITS_TO_KEEP,
    POSITION_IDS,
)
from runtime.embeddings import Embeddings
from runtime.errors import UserError
from runtime.session import Floats, Ints, check_backend


class ForwardSession(Protocol):
    """A loaded graph without a cache: whole rows in, every output out.

    Attributes:
        backend, version, device, choice: as `runtime.session.Session` has them.
        max_length: tokens that a row may have.
    """

    backend: str
    version: str
    device: str
    choice: str
    max_length: int

    def run(
        self, input_ids: Ints, attention_mask: Ints, position_ids: Ints | None = None, *, keep: int = 1
    ) -> dict[str, Floats]:
        """Run rows through the graph.

        Args:
            input_ids: int64 [batch, sequence]; ids of padding must be in the vocabulary too.
            attention_mask: int64 [batch, sequence], 1 for a real token, 0 for padding on either side.
            position_ids: int64 [batch, sequence], only where the graph takes them (default: 0, 1, … in every row).
            keep: of task text-generation, how many of each row's last real tokens want logits. A row with fewer
                repeats its first.

        Returns:
            Every output of the graph by its name, float32, at its full shape: see `runtime.contract`.

        Raises:
            UserError: shapes that do not fit, a row without a token or beyond `max_length`, an id outside the
                vocabulary, or positions that the graph does not take.
            CheckFailed: the graph does not run.
        """
        ...


class ForwardContract:
    """What one bundle's forward graph is fed, checked."""

    def __init__(self, bundle: Bundle) -> None:
        """Read what the manifest says of the graph's inputs.

        Raises:
            UserError: the graph has a cache, or takes embeddings that the bundle does not have.
        """
        if bundle.has_cache:
            raise UserError(f"{bundle.path} has a key/value cache; open it with runtime.session.open_session")
        self._path = bundle.path
        self._names = bundle.input_names
        self._vocab_size = bundle.vocab_size
        self._max_length = bundle.manifest.max_length
        self._embeddings = Embeddings(bundle) if INPUTS_EMBEDS in self._names else None

    def feeds(
        self, input_ids: Ints, attention_mask: Ints, position_ids: Ints | None = None, *, keep: int = 1
    ) -> dict[str, NDArray[Any]]:
        """The graph's inputs by name, contiguous; see `ForwardSession.run` for the arguments and what is refused."""
        ids, mask = (np.ascontiguousarray(array, np.int64) for array in (input_ids, attention_mask))
        self._check(ids, mask, position_ids, keep)
        feeds: dict[str, NDArray[Any]] = {INPUT_IDS: ids, ATTENTION_MASK: mask}
        if self._embeddings is not None:
            feeds[INPUTS_EMBEDS] = self._embeddings.look_up(feeds.pop(INPUT_IDS))
        if POSITION_IDS in self._names:
            positions = np.arange(ids.shape[1]) if position_ids is None else position_ids
            feeds[POSITION_IDS] = np.ascontiguousarray(np.broadcast_to(positions, ids.shape), np.int64)
        if LOGITS_TO_KEEP in self._names:
            feeds[LOGITS_TO_KEEP] = np.array([keep], np.int64)
        if LOGITS_INDICES in self._names:
            first, end = mask.argmax(1), mask.shape[1] - mask[:, ::-1].argmax(1)
            feeds[LOGITS_INDICES] = np.maximum(end[:, None] + np.arange(-keep, 0), first[:, None])
        return feeds

    def _check(self, ids: Ints, mask: Ints, positions: Ints | None, keep: int) -> None:
        if ids.ndim != 2 or ids.size == 0 or mask.shape != ids.shape:
            raise UserError(f"a graph takes tokens and mask [batch, sequence], not {ids.shape} and {mask.shape}")
        if not np.isin(mask, (0, 1)).all():
            raise UserError("an attention mask should hold 0 and 1 only; give 1 for every real token")
        if keep < 1:
            raise UserError(f"keep should be at least 1, not {keep}")
        for row in np.flatnonzero(~mask.any(1)):
            raise UserError(f"row {row} has no real token; leave it out, or set its attention mask")
        if ids.shape[1] > self._max_length:
            raise UserError(
                f"rows of {ids.shape[1]} tokens pass the {self._max_length} of {self._path}; shorten them, or export "
                "with a larger --max-length"
            )
        for row, column in np.argwhere((ids < 0) | (ids >= self._vocab_size)):
            raise UserError(
                f"row {row}: token id {ids[row, column]} is outside the vocabulary of {self._vocab_size}; "
                "use ids of this bundle's tokenizer"
            )
        if positions is None:
            return
        if POSITION_IDS not in self._names:
            raise UserError(f"{self._path} takes no {POSITION_IDS}; export it with them as an input")
        if np.min(positions) < 0 or np.max(positions) >= self._max_length:
            raise UserError(f"{POSITION_IDS} should be within 0..{self._max_length - 1}")


def open_forward(
    bundle: Bundle, *, backend: str = "auto", device: str | None = None, threads: int | None = None
) -> ForwardSession:
    """Load a bundle's graph without a cache on a backend.

    Args:
        bundle: of either target; ONNX Runtime runs both.
        backend: `auto` or `onnxruntime`.
        device: `cpu` (default) or `cuda`.
        threads: threads within an operator (default: one per core).

    Raises:
        UserError: unknown backend or device, a backend that is not installed or has no engines of such graphs.
    """
    check_backend(backend, device, threads)
    _check_engines(bundle, backend)
    from runtime.ort_forward import OrtForward

    session = OrtForward(bundle, device=device or "cpu", threads=threads)
    if bundle.manifest.target != "onnxruntime" and backend == "auto":
        why = f"{bundle.path} has no key/value cache, and TensorRT has no engines of such graphs yet"
        session.choice = f"{session.backend} {session.version}: {why}"
    return session


def check_forward(bundle: Bundle, backend: str, device: str | None) -> None:
    """Refuse what `open_forward` would, as far as that is known before the graph is loaded.

    Args:
        bundle: without a cache.
        backend, device: as `open_forward` takes them.

    Raises:
        UserError: as `open_forward`.
    """
    check_backend(backend, device, None)
    _check_engines(bundle, backend)
    from runtime.ort_forward import check_whole_rows

    check_whole_rows(bundle, device or "cpu")


def _check_engines(bundle: Bundle, backend: str) -> None:
    if backend not in ("auto", "onnxruntime"):
        raise UserError(
            f"{bundle.path} has no key/value cache, and {backend} has no engines of such graphs yet; "
            "use --backend onnxruntime"
        )
