"""A step, between the caller and a graph: what is refused, which rows run together, what the graph is fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
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
    WRITE_INDICES,
)
from runtime.embeddings import Embeddings
from runtime.errors import UserError
from runtime.session import Floats, Ints


@dataclass(frozen=True)
class Step:
    """The arguments of `Session.step`, checked: int64, padding 0, slots given."""

    tokens: Ints
    lengths: Ints
    past: Ints
    slots: Ints
    keep: int

    def rows(self, rows: slice) -> Step:
        """Some of the rows, without the columns that are padding in all of them."""
        width = int(self.lengths[rows].max())
        return Step(self.tokens[rows, :width], self.lengths[rows], self.past[rows], self.slots[rows], self.keep)

    def pieces(self, width: int, kept: int) -> Iterator[Piece]:
        """Cut the step into pieces of at most `width` columns that ask for at most `kept` logits a row, in order."""
        if self.keep > kept:
            width = min(width, kept)  # then a piece's logits are all of its columns'
        for start in range(0, self.tokens.shape[1], width):
            rows = np.flatnonzero(self.lengths > start)
            if not len(rows):
                return
            lengths = np.minimum(self.lengths[rows] - start, width)
            tokens = self.tokens[rows, start : start + width]
            step = Step(tokens, lengths, self.past[rows] + start, self.slots[rows], min(self.keep, kept))
            yield Piece(step, rows, self.wanted()[rows] - start)

    def wanted(self) -> Ints:
        """The columns whose logits are asked for, none below 0: int64 [batch, keep]."""
        wanted: Ints = np.maximum(self.lengths[:, None] + np.arange(-self.keep, 0), 0)
        return wanted


@dataclass(frozen=True)
class Piece:
    """Some columns of a step, for the rows that have tokens there; `wanted` counts from the first of these columns."""

    step: Step
    rows: Ints
    wanted: Ints

    def place(self, logits: Floats, into: Floats) -> None:
        """Put those of the piece's logits that the whole step wants where they belong."""
        index = self.wanted + self.step.keep - self.step.lengths[:, None]
        row, column = np.nonzero((self.wanted >= 0) & (index >= 0) & (index < self.step.keep))
        into[self.rows[row], column] = logits[row, index[row, column]]


class GraphContract(Protocol):
    """How one target's graph is driven."""

    def split(self, step: Step, capacity: int) -> list[slice]:
        """Cut a step into runs of rows that the graph can take at once, on its cache as it lies in memory."""
        ...

    def feeds(self, step: Step, capacity: int | None = None) -> Mapping[str, NDArray[Any]]:
        """The graph's inputs but for the cache, for rows that run together; each array is contiguous.

        Given the cache's capacity, no shape depends on the past: for steps of one token.
        """
        ...


class MaskContract:
    """Target `onnxruntime`: a mask says which tokens are real."""

    def split(self, step: Step, capacity: int) -> list[slice]:  # noqa: ARG002 - the mask keeps padding out of the cache
        """Several new tokens and a past do not meet in one batch: there GroupQueryAttention takes one row at a time."""

        def together(rows: slice) -> bool:
            return bool(step.lengths[rows].max() == 1 or not step.past[rows].any())

        return _runs(step.slots, together)

    def feeds(self, step: Step, capacity: int | None = None) -> dict[str, Ints]:
        """Tokens, mask [batch, total or capacity] and how many logits are kept."""
        valid = step.past + step.lengths
        total = valid.max() if capacity is None else capacity
        return {
            INPUT_IDS: np.ascontiguousarray(step.tokens),
            ATTENTION_MASK: (np.arange(total) < valid[:, None]).astype(np.int64),
            LOGITS_TO_KEEP: np.array([step.keep], np.int64),
        }


class IndexContract:
    """Target `tensorrt`: each row is written from its own index on, padding included."""

    def split(self, step: Step, capacity: int) -> list[slice]:
        """Rows run apart where the padding that they would give each other passes the capacity."""

        def together(rows: slice) -> bool:
            return bool(step.past[rows].max() + step.lengths[rows].max() <= capacity)

        return _runs(step.slots, together)

    def feeds(self, step: Step, capacity: int | None = None) -> dict[str, Ints]:  # noqa: ARG002 - shapes never do
        """Tokens, where each row's are written, and the columns whose logits are wanted, none below 0."""
        return {
            INPUT_IDS: np.ascontiguousarray(step.tokens),
            WRITE_INDICES: np.ascontiguousarray(step.past),
            LOGITS_INDICES: step.wanted(),
        }


CONTRACTS: dict[str, GraphContract] = {"onnxruntime": MaskContract(), "tensorrt": IndexContract()}


@dataclass(frozen=True)
class BundleContract:
    """A target's contract with what one export added to it: `position_ids`, and embeddings in place of token ids."""

    base: GraphContract
    positions: bool
    embeddings: Embeddings | None

    def split(self, step: Step, capacity: int) -> list[slice]:
        """As the target's graphs are split."""
        return self.base.split(step, capacity)

    def feeds(self, step: Step, capacity: int | None = None) -> dict[str, NDArray[Any]]:
        """The target's inputs, positions [batch, sequence] from each row's past on, and looked-up embeddings."""
        feeds: dict[str, NDArray[Any]] = dict(self.base.feeds(step, capacity))
        if self.positions:
            feeds[POSITION_IDS] = step.past[:, None] + np.arange(step.tokens.shape[1])
        if self.embeddings is not None:
            feeds[INPUTS_EMBEDS] = self.embeddings.look_up(feeds.pop(INPUT_IDS))
        return feeds


def contract_of(bundle: Bundle) -> GraphContract:
    """How the bundle's cached graph is driven, from its target and the inputs that its manifest names.

    Raises:
        UserError: an unknown target, or the graph takes embeddings and the bundle has none.
    """
    if bundle.manifest.target not in CONTRACTS:
        known = " or ".join(CONTRACTS)
        raise UserError(f"{bundle.path} is for {bundle.manifest.target}; export it with --target {known}")
    embeddings = Embeddings(bundle) if INPUTS_EMBEDS in bundle.input_names else None
    return BundleContract(CONTRACTS[bundle.manifest.target], POSITION_IDS in bundle.input_names, embeddings)


@dataclass(frozen=True)
class Limits:
    """What a step may ask of a session: cache rows, tokens per row, vocabulary, and the largest capacity there is."""

    slots: int
    capacity: int
    vocab_size: int
    max_length: int

    def checked(self, tokens: Ints, lengths: Ints, past: Ints, slots: Ints | None, keep: int) -> Step:
        """Refuse a step that a graph would get wrong; return it with the padding made harmless.

        Raises:
            UserError: shapes that do not fit, a number out of range, a row that passes the capacity.
        """
        tokens, lengths, past = (np.asarray(a, np.int64) for a in (tokens, lengths, past))
        slots = np.arange(len(tokens)) if slots is None else np.asarray(slots, np.int64)
        shapes = [a.shape for a in (tokens, lengths, past, slots)]
        if tokens.ndim != 2 or tokens.size == 0 or any(shape != tokens.shape[:1] for shape in shapes[1:]):
            raise UserError(f"a step takes tokens [batch, sequence] and three arrays [batch], not {shapes}")
        width = tokens.shape[1]
        new, cached, places = lengths.tolist(), past.tolist(), slots.tolist()  # a few numbers: arrays take ten times
        if keep < 1:
            raise UserError(f"keep should be at least 1, not {keep}")
        if min(new) < 1 or max(new) > width:
            raise UserError(f"lengths {new} should be within 1..{width}")
        if min(places) < 0 or max(places) >= self.slots or len(set(places)) != len(places):
            raise UserError(f"slots {places} should be distinct and within 0..{self.slots - 1}")
        if min(cached) < 0:
            raise UserError(f"past lengths {cached} should not be negative")
        for row, (before, more) in enumerate(zip(cached, new, strict=True)):
            if before + more > self.capacity:
                raise UserError(
                    f"row {row}: {before} cached and {more} new tokens pass the capacity of "
                    f"{self.capacity}; send fewer, or open the session with up to {self.max_length}"
                )
        tokens = np.where(np.arange(width) < lengths[:, None], tokens, 0)
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            row, column = np.argwhere((tokens < 0) | (tokens >= self.vocab_size))[0]
            raise UserError(
                f"row {row}: token id {tokens[row, column]} is outside the vocabulary of {self.vocab_size}; "
                "use ids of this bundle's tokenizer"
            )
        return Step(tokens, lengths, past, slots, keep)


def check_allocation(
    slots: int, capacity: int, limit: int, where: object, remedy: str = "export with a larger --max-length"
) -> None:
    """Refuse a cache of nothing, or of more tokens than `where` was made for.

    Raises:
        UserError: either.
    """
    if capacity < 1 or slots < 1:
        raise UserError(f"a cache of {slots} slots of {capacity} tokens is none; ask for at least one of each")
    if capacity > limit:
        raise UserError(f"a capacity of {capacity} tokens passes the {limit} of {where}; ask for less, or {remedy}")


def _runs(slots: Ints, together: Callable[[slice], bool]) -> list[slice]:
    """Rows of consecutive slots, as many at once as `together` allows."""
    cuts = [0]
    for row in range(1, len(slots)):
        if slots[row] != slots[row - 1] + 1 or not together(slice(cuts[-1], row + 1)):
            cuts.append(row)
    return [slice(start, stop) for start, stop in zip(cuts, [*cuts[1:], len(slots)], strict=True)]
