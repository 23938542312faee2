"""What the generation loop needs of a backend, and the one place that chooses it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.errors import UserError

if TYPE_CHECKING:
    from runtime.engines import Chosen

BACKENDS = ("auto", "onnxruntime", "tensorrt", "tensorrt-rtx")
DEVICES = ("cpu", "cuda")

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


class Session(Protocol):
    """A loaded model and a cache of `slots` rows of `capacity` tokens, allocated once, updated in place.

    Attributes:
        backend: what runs the graph, as in results: `onnxruntime-cpu`.
        version: of the backend's library.
        device: the hardware it runs on, in words that change when the hardware or its driver does.
        choice: where there was something to choose between, which backend was chosen and why; else empty.
        slots: rows of the cache.
        capacity: tokens per row.
        vocab_size: token ids are 0..vocab_size-1.
        max_slots: rows that `reopen` gives at most; None where memory alone limits them.
        max_capacity: tokens per row that `reopen` gives at most.
    """

    backend: str
    version: str
    device: str
    choice: str
    slots: int
    capacity: int
    vocab_size: int
    max_slots: int | None
    max_capacity: int

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

    def copy_prefix(self, source: int, target: int, length: int) -> int:
        """Let one slot begin with the first tokens of another.

        Args:
            source: a slot that holds at least `length` tokens.
            target: another, what it held is lost.
            length: tokens to copy.

        Returns:
            How many tokens were copied: none where the cache is out of reach.
        """
        ...

    def exchange(self, one: int, other: int, length: int) -> bool:
        """Let two slots have each other's first `length` tokens.

        Returns:
            Whether they do: not where the cache is out of reach.
        """
        ...

    def reopen(self, *, slots: int, capacity: int) -> Self:
        """A session on the same loaded weights with a cache of its own, of other dimensions.

        Raises:
            UserError: more than `max_slots` rows or `max_capacity` tokens.
        """
        ...


def open_session(
    bundle: str | Path | Bundle,
    *,
    backend: str = "auto",
    device: str | None = None,
    slots: int = 1,
    capacity: int | None = None,
    threads: int | None = None,
    capture: bool = False,
) -> Session:
    """Load a bundle's model on a backend.

    Args:
        bundle: the bundle, or its directory, of task text-generation; without a cache, steps compute whole rows anew.
        backend: one of BACKENDS; `auto` takes TensorRT where the bundle has an engine for this GPU, else ONNX Runtime.
        device: where ONNX Runtime runs, `cpu` (default) or `cuda`; given `cpu`, `auto` takes no engine.
        slots: rows of the cache, the largest batch a step can take.
        capacity: tokens per row (default and maximum: the bundle's `max_length`, or the engine's).
        threads: threads within an operator of ONNX Runtime (default: one per core).
        capture: whether decode steps of ONNX Runtime on `cuda` become CUDA graphs, see `OrtSession`; TensorRT's do
            anyway.

    Raises:
        UserError: unknown backend or device, a capacity beyond the bundle's, a backend that is not installed, or
            no engine for this GPU.
    """
    check_backend(backend, device, threads)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if opened.manifest.task == "text-generation" and not opened.has_cache:
        from runtime.forward import open_forward
        from runtime.recompute_session import RecomputeSession

        if capture:
            raise UserError(f"{opened.path} has no cache, so no steps of one shape to capture; open it without capture")
        forward = open_forward(opened, backend=backend, device=device, threads=threads)
        return RecomputeSession(opened, forward, slots=slots, capacity=capacity)
    chosen, why = _choose(opened, backend, device)
    if chosen is not None:
        from runtime.trt_session import TrtSession

        return TrtSession(opened, chosen=chosen, slots=slots, capacity=capacity)
    check_placement(opened, device)
    from runtime.ort_session import OrtSession

    try:
        session = OrtSession(
            opened, device=device or "cpu", slots=slots, capacity=capacity, threads=threads, capture=capture
        )
    except UserError as error:
        if not why:
            raise
        raise UserError(f"{why}; and ONNX Runtime cannot take over: {error}") from error
    session.choice = f"{session.backend} {session.version}: {why}" if why else ""
    return session


def check_runs(bundle: Bundle, backend: str, device: str | None = None) -> None:
    """Refuse what `open_session` or `open_forward` would, as far as that is known before anything is loaded.

    What only loading tells is whether a library starts, takes the graph or plan, and finds the memory.

    Args:
        bundle: an opened one, of any task.
        backend, device: as `open_session` takes them.

    Raises:
        UserError: why it would not run there, and what to do.
    """
    if not bundle.has_cache:
        from runtime.forward import check_forward

        check_forward(bundle, backend, device)
        return
    check_backend(backend, device, None)
    chosen, _ = _choose(bundle, backend, device)
    if chosen is None:
        from runtime.ort_session import check_cached

        check_placement(bundle, device)
        check_cached(bundle, device or "cpu")


def check_backend(backend: str, device: str | None, threads: int | None) -> None:
    """Refuse what no backend takes.

    Raises:
        UserError: unknown backend or device, or no thread.
    """
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}")
    if device not in (None, *DEVICES):
        raise UserError(f"unknown device {device!r}; known: {', '.join(DEVICES)}")
    if threads is not None and threads < 1:
        raise UserError(f"threads should be at least 1, not {threads}")


def remarks(bundle: Bundle, choice: str) -> list[str]:
    """What a user should know of a loaded bundle: why this backend, and that nobody checked it where nobody did."""
    unchecked = f"{bundle.path} was exported without the parity gate: nothing says it is the checkpoint's model"
    return [text for text in (choice, "" if bundle.manifest.parity else unchecked) if text]


def _choose(bundle: Bundle, backend: str, device: str | None) -> tuple[Chosen | None, str]:
    """The engine to run; or None for ONNX Runtime, and why, where an engine was to be thought of."""
    if backend == "onnxruntime" or (backend == "auto" and bundle.manifest.target != "tensorrt"):
        return None, ""
    if device == "cpu":
        if backend == "auto":
            return None, "--device cpu"
        raise UserError(f"--backend {backend} runs on the GPU; leave out --device cpu, or use --backend onnxruntime")
    from runtime.engines import choose_engine

    if backend != "auto":
        return choose_engine(bundle, backend), ""
    try:
        return choose_engine(bundle), ""
    except UserError as error:
        return None, str(error)


def check_placement(bundle: Bundle, device: str | None) -> None:
    """Refuse what ONNX Runtime would run elsewhere than it is asked to.

    Raises:
        UserError: a graph of target onnxruntime that computes in fp32, on CUDA.
    """
    if device == "cuda" and bundle.manifest.target == "onnxruntime" and bundle.manifest.activations == "fp32":
        raise UserError(
            f"{bundle.path} has fp32 activations, and ONNX Runtime's grouped attention on CUDA takes 16 bit only: it "
            "would run on the CPU, its cache carried over at every step; use --device cpu, or export with fp16 "
            "activations (--precision fp16, or those of a --recipe)"
        )
