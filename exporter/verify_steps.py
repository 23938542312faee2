"""What the parity gate runs on a session with a cache: unequal rows, a chunk, single tokens, and a full capacity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from exporter.evaluate.session import CachedSession
from exporter.reference import Row
from exporter.rounded_cache import CacheView
from runtime.bundle import Bundle
from runtime.session import Floats, Ints

END = "end of capacity"
DECODE_STEPS = 32


@dataclass(frozen=True)
class Step:
    """One `Session.step`, and the logits it gave: float32 [batch, keep, vocab]."""

    case: str
    tokens: Ints
    lengths: Ints
    past: Ints
    slots: Ints
    logits: Floats

    @property
    def positions(self) -> Ints:
        """The row position of every logit, int64 [batch, keep]."""
        keep = self.logits.shape[1]
        within: Ints = np.maximum(self.lengths[:, None] - keep + np.arange(keep), 0)
        return self.past[:, None] + within


@dataclass(frozen=True)
class Rows:
    """What the rows held in the end: tokens, and per row keys and values [layers, kv_heads, capacity, head_dim]."""

    capacity: int
    tokens: list[list[int]]
    keys: list[Floats]
    values: list[Floats]

    def as_cached(self) -> list[Row]:
        """What a rounded cache is compared with: whole rows, whose near ties go as they went here."""
        rows = zip(self.tokens, self.keys, self.values, strict=True)
        return [Row(t, kept=list(zip(k[:, :, : len(t)], v[:, :, : len(t)], strict=True))) for t, k, v in rows]


def run_rows(
    loaded: CachedSession,
    prompts: list[list[int]],
    max_length: int,
    view: CacheView,
    progress: Callable[[int], None],
) -> tuple[list[Step], Rows]:
    """Prefill three unequal rows, append a chunk to one of them, then decode all of them greedily."""
    capacity = min(max_length, 4 * max(map(len, prompts)))
    longest = max(1, min(max(map(len, prompts)), capacity // 3))
    chunk = max(1, longest // 4)
    rows = [prompts[0][:longest], prompts[1][: max(1, longest // 3)], prompts[2][: max(1, 2 * longest // 3)]]
    session = loaded.reopen(slots=len(rows), capacity=capacity)
    steps: list[Step] = []

    def step(case: str, new: list[list[int]], slots: list[int], keep: int) -> Floats:
        tokens = np.array([row + [0] * (max(map(len, new)) - len(row)) for row in new])
        lengths, at = np.array([len(row) for row in new]), np.array(slots)
        past = np.array([len(rows[slot]) for slot in slots]) if case != "prefill" else np.zeros_like(at)
        logits = session.step(tokens, lengths, past, at, keep)
        steps.append(Step(case, tokens, lengths, past, at, logits))
        progress(len(steps))
        return logits

    everyone = list(range(len(rows)))
    logits = step("prefill", rows, everyone, longest)[:, -1]
    if len(rows[1]) + chunk < capacity:
        logits = logits.copy()
        addition = prompts[1][-chunk:]
        logits[1] = step("chunk", [addition], [1], chunk)[0, -1]
        rows[1] = rows[1] + addition
    for _ in range(min(DECODE_STEPS, capacity - max(map(len, rows)))):
        new = [[int(row.argmax())] for row in logits]
        logits = step("decode", new, everyone, 1)[:, -1]
        rows = [row + token for row, token in zip(rows, new, strict=True)]
    cache = view.of(session.cache)
    keys, values = (np.stack([cache.read(layer)[i] for layer in range(cache.layers)], 1) for i in (0, 1))
    return steps, Rows(capacity, rows, list(keys), list(values))


@dataclass(frozen=True)
class End:
    """The last positions of the capacity: what ran, and the logits, keys and values it gave."""

    row: Row
    logits: Floats
    keys: Floats
    values: Floats

    def as_cached(self) -> Row:
        """The row whose near ties go as they went here."""
        return replace(self.row, kept=list(zip(self.keys, self.values, strict=True)))


def run_end_of_capacity(loaded: CachedSession, bundle: Bundle, view: CacheView) -> End:
    """Fill all but the last positions of the capacity with random keys and values; then a chunk and a last token."""
    capacity = bundle.manifest.max_length
    count = min(8, max(1, capacity // 2))
    past = capacity - count
    random = np.random.default_rng(1)
    tokens = random.integers(bundle.vocab_size, size=count)
    session = loaded.reopen(slots=1, capacity=capacity)
    geometry, cache = bundle.cache_geometry, view.of(session.cache)
    shape = (1, geometry.kv_heads, capacity, geometry.head_dim)
    seeded = []
    for layer in range(geometry.layers):
        cache.write(layer, *(random.standard_normal(shape, np.float32) for _ in range(2)))
        key, value = cache.read(layer)  # as the cache rounded them
        seeded.append((key[0, :, :past], value[0, :, :past]))

    logits = []
    for chunk, start in ((tokens[:-1], past), (tokens[-1:], capacity - 1)):
        if len(chunk):
            length = np.array([len(chunk)])
            logits.append(session.step(chunk[None], length, np.array([start]), keep=len(chunk))[0])
    caches = [cache.read(layer) for layer in range(geometry.layers)]
    keys, values = (np.stack([pair[i][0, :, past:] for pair in caches]) for i in (0, 1))
    return End(Row(tokens.tolist(), seeded), np.concatenate(logits), keys, values)
