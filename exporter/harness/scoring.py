"""Log-probabilities of given tokens by a session: batched, in pieces, and no shared beginning computed twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exporter.harness.paths import Path, Query, chains, lay_out
from runtime.errors import CheckFailed
from runtime.session import Floats, Session

WIDTH = 256  # tokens of a row that a step takes at most
LOGITS_BYTES = 1 << 29  # of a step: with 256 000 tokens those of 512 positions
SLACK = 4  # padding that costs about as much as a step of its own
PADDED = 0.25  # of a batch, at most


@dataclass(frozen=True)
class Score:
    """What a continuation is worth: the natural logarithm of its probability, and whether greedy decoding says it."""

    logprob: float
    greedy: bool


@dataclass
class Tokens:
    """Tokens that were asked for, each query with its context, and those that were sent to the model for them."""

    asked: int = 0
    computed: int = 0


@dataclass(frozen=True)
class _Piece:
    """Some tokens of a path, to be sent behind those that its slot holds."""

    slot: int
    path: Path
    start: int
    stop: int

    @property
    def width(self) -> int:
        return self.stop - self.start

    @property
    def wanted(self) -> list[int]:
        return [position for position in sorted(self.path.wanted) if self.start <= position < self.stop]

    @property
    def keep(self) -> int:
        """Last positions whose logits are needed, at least one: a step always gives that."""
        return self.stop - min(self.wanted, default=self.stop - 1)


def score(
    open_session: Callable[[int, int], Session],
    queries: Sequence[Query],
    rows: int,
    counted: Tokens,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> list[Score]:
    """Score continuations.

    Args:
        open_session: given slots and tokens of each, a session with a cache of that size.
        queries: in any order; each with at least one target and as many tokens.
        rows: of a batch at most.
        counted: to which what was asked and computed is added.
        progress: called with the tokens that are done and all there are to compute.

    Returns:
        The scores, in the order of the queries. Sums are in float64.

    Raises:
        CheckFailed: logits are not numbers.
        UserError: the backend has no memory for the batch.
    """
    paths = lay_out(queries)
    runs = chains(paths, rows)
    counted.asked += sum(len(query.tokens) for query in queries)
    if not runs:
        return []
    session = open_session(len(runs), max(len(path.tokens) for path in paths))
    total = sum(paths[run.start].common + sum(paths[index].new for index in run) for run in runs)
    logprobs, greedy = np.zeros(len(queries)), np.ones(len(queries), bool)
    done = 0
    waiting = [_pieces(slot, [paths[index] for index in run]) for slot, run in enumerate(runs)]
    pieces = [next(pieces) for pieces in waiting]
    while pieces:
        for batch in _batches(pieces, session.vocab_size):
            logits = _run(session, batch)
            for piece, row in zip(batch, logits, strict=True):
                for position in piece.wanted:
                    _note(row[position - piece.stop], piece.path.wanted[position], logprobs, greedy)
            done += sum(piece.width for piece in batch)
            progress(done, total)
        pieces = [piece for piece in (next(waiting[piece.slot], None) for piece in pieces) if piece is not None]
    counted.computed += done
    return [Score(float(value), bool(said)) for value, said in zip(logprobs, greedy, strict=True)]


def _pieces(slot: int, paths: Sequence[Path]) -> Iterator[_Piece]:
    """What one slot is sent, path after path: of the first all tokens, of the others what the one before lacks."""
    for number, path in enumerate(paths):
        begin = path.common if number else 0
        for start in range(begin, len(path.tokens), WIDTH):
            yield _Piece(slot, path, start, min(start + WIDTH, len(path.tokens)))


def _batches(pieces: Sequence[_Piece], vocab_size: int) -> Iterator[list[_Piece]]:
    """Pieces that run together, widest first: hardly padded, and their logits within memory."""
    batch: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: (-piece.width, -piece.keep)):
        if batch and not _fit([*batch, piece], vocab_size):
            yield sorted(batch, key=lambda piece: piece.slot)
            batch = []
        batch.append(piece)
    yield sorted(batch, key=lambda piece: piece.slot)


def _fit(batch: Sequence[_Piece], vocab_size: int) -> bool:
    padded = len(batch) * max(piece.width for piece in batch)
    padding = padded - sum(piece.width for piece in batch)
    kept = len(batch) * max(piece.keep for piece in batch)
    return padding <= PADDED * padded + SLACK * len(batch) and 4 * kept * vocab_size <= LOGITS_BYTES


def _run(session: Session, batch: Sequence[_Piece]) -> Floats:
    """One step; logits [batch, keep, vocab], each row's wanted positions counted from its end."""
    lengths = np.array([piece.width for piece in batch])
    tokens = np.zeros((len(batch), lengths.max()), np.int64)
    for row, piece in enumerate(batch):
        tokens[row, : piece.width] = piece.path.tokens[piece.start : piece.stop]
    past = np.array([piece.start for piece in batch])
    slots = np.array([piece.slot for piece in batch])
    return session.step(tokens, lengths, past, slots, keep=max(piece.keep for piece in batch))


def _note(
    logits: Floats, wanted: Sequence[tuple[int, int]], logprobs: NDArray[np.float64], greedy: NDArray[np.bool_]
) -> None:
    """Add what float32 logits [vocab] say of the tokens that are wanted after them."""
    best = int(logits.argmax())
    top = float(logits[best])
    if not np.isfinite(top):
        raise CheckFailed("the model produced logits that are not finite; run nemotron-export selftest on the bundle")
    norm = top + float(np.log(np.exp(logits - logits[best]).sum(dtype=np.float64)))
    for query, target in wanted:
        logprobs[query] += float(logits[target]) - norm
        greedy[query] &= target == best
