"""What the parity gate runs on a session with a cache: unequal rows, a chunk, single tokens, and a full capacity."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import numpy as np

from exporter.evaluate.session import Cache, CachedSession
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


@dataclass(frozen=True)
class Request:
    """A step that the gate runs: the arguments of `Session.step`."""

    case: str
    tokens: Ints
    lengths: Ints
    past: Ints
    slots: Ints
    keep: int

    def answered(self, logits: Floats) -> Step:
        """The step with the logits that it gave."""
        return Step(self.case, self.tokens, self.lengths, self.past, self.slots, logits)


def capacity_of(prompts: list[list[int]], max_length: int) -> int:
    """Tokens of a row that `requests` fills."""
    return min(max_length, 4 * max(map(len, prompts)))


def requests(
    prompts: list[list[int]], max_length: int, decode_steps: int = DECODE_STEPS
) -> Generator[Request, list[int], list[list[int]]]:
    """Prefill three unequal rows, append a chunk to one of them, then decode all of them; give the rows in the end.

    What is sent after a step is the next token of each of its rows.
    """
    capacity = capacity_of(prompts, max_length)
    longest = max(1, min(max(map(len, prompts)), capacity // 3))
    chunk = max(1, longest // 4)
    rows = [prompts[0][:longest], prompts[1][: max(1, longest // 3)], prompts[2][: max(1, 2 * longest // 3)]]

    def request(case: str, new: list[list[int]], slots: list[int], keep: int) -> Request:
        tokens = np.array([row + [0] * (max(map(len, new)) - len(row)) for row in new])
        lengths, at = np.array([len(row) for row in new]), np.array(slots)
        past = np.array([len(rows[slot]) for slot in slots]) if case != "prefill" else np.zeros_like(at)
        return Request(case, tokens, lengths, past, at, keep)

    everyone = list(range(len(rows)))
    following = yield request("prefill", rows, everyone, longest)
    if len(rows[1]) + chunk < capacity:
        addition = prompts[1][-chunk:]
        (following[1],) = yield request("chunk", [addition], [1], chunk)
        rows[1] = rows[1] + addition
    for _ in range(min(decode_steps, capacity - max(map(len, rows)))):
        new = [[token] for token in following]
        following = yield request("decode", new, everyone, 1)
        rows = [row + token for row, token in zip(rows, new, strict=True)]
    return rows


def run_rows(
    loaded: CachedSession,
    prompts: list[list[int]],
    max_length: int,
    view: CacheView,
    progress: Callable[[int], None],
) -> tuple[list[Step], Rows]:
    """Run `requests`, each row's next token the likeliest."""
    capacity = capacity_of(prompts, max_length)
    session = loaded.reopen(slots=len(prompts), capacity=capacity)
    steps: list[Step] = []
    asked = requests(prompts, max_length)
    request = next(asked)
    while True:
        logits = session.step(request.tokens, request.lengths, request.past, request.slots, request.keep)
        steps.append(request.answered(logits))
        progress(len(steps))
        try:
            request = asked.send(logits[:, -1].argmax(-1).tolist())
        except StopIteration as done:
            rows: list[list[int]] = done.value
            break
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


def end_of_capacity(bundle: Bundle) -> tuple[list[Request], np.random.Generator]:
    """A chunk and a last token at the last positions of the capacity, and what draws the cache ahead of them."""
    capacity = bundle.manifest.max_length
    count = min(8, max(1, capacity // 2))
    random = np.random.default_rng(1)
    tokens, slot = random.integers(bundle.vocab_size, size=count), np.array([0])
    asked = [
        Request(END, chunk[None], np.array([len(chunk)]), np.array([start]), slot, len(chunk))
        for chunk, start in ((tokens[:-1], capacity - count), (tokens[-1:], capacity - 1))
        if len(chunk)
    ]
    return asked, random


def seed(
    cache: Cache, layer: int, random: np.random.Generator, shape: tuple[int, ...], past: int
) -> tuple[Floats, Floats]:
    """Fill a layer's cache with random keys and values; those ahead of the steps, [kv_heads, past, head_dim]."""
    cache.write(layer, *(random.standard_normal(shape, np.float32) for _ in range(2)))
    key, value = cache.read(layer)  # as the cache rounded them
    return key[0, :, :past], value[0, :, :past]


def run_end_of_capacity(loaded: CachedSession, bundle: Bundle, view: CacheView) -> End:
    """Fill all but the last positions of the capacity with random keys and values; then a chunk and a last token."""
    capacity = bundle.manifest.max_length
    asked, random = end_of_capacity(bundle)
    past = int(asked[0].past[0])
    session = loaded.reopen(slots=1, capacity=capacity)
    geometry, cache = bundle.cache_geometry, view.of(session.cache)
    shape = (1, geometry.kv_heads, capacity, geometry.head_dim)
    seeded = [seed(cache, layer, random, shape, past) for layer in range(geometry.layers)]

    logits = [session.step(a.tokens, a.lengths, a.past, keep=a.keep)[0] for a in asked]
    caches = [cache.read(layer) for layer in range(geometry.layers)]
    keys, values = (np.stack([pair[i][0, :, past:] for pair in caches]) for i in (0, 1))
    tokens = [int(token) for request in asked for token in request.tokens[0]]
    return End(Row(tokens, seeded), np.concatenate(logits), keys, values)
