"""Golden cases: steps and their logits, stored by the exporter, replayed where a bundle runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Bundle
from runtime.errors import CheckFailed
from runtime.forward import ForwardSession, open_forward
from runtime.golden_file import STEPS, reading
from runtime.golden_forward import GoldenForward, replay_forward
from runtime.manifest import GOLDEN
from runtime.measured import Comparison, Parity
from runtime.session import Floats, Ints, Session, open_session

_STEP_ARRAYS = ("tokens", "lengths", "past_lengths", "slots", "keep", "top_ids", "top_logits")


@dataclass(frozen=True)
class GoldenStep:
    """One `Session.step` and its most likely tokens.

    Attributes:
        case: what the step stands for, as in the gate: "prefill", "decode", "chunk".
        tokens, lengths, past_lengths, slots: int64, as `Session.step` takes them.
        keep: positions per row with logits.
        top_ids: int64 [batch, keep, k], the k largest logits' tokens, largest first.
        top_logits: float32 [batch, keep, k], their values.
    """

    case: str
    tokens: Ints
    lengths: Ints
    past_lengths: Ints
    slots: Ints
    keep: int
    top_ids: Ints
    top_logits: Floats

    @classmethod
    def record(
        cls,
        case: str,
        *,
        tokens: Ints,
        lengths: Ints,
        past_lengths: Ints,
        slots: Ints,
        logits: Floats,
        top: int = 16,
    ) -> Self:
        """The step that gave these logits, float32 [batch, keep, vocab], by its `top` largest."""
        # Row by row: the order of 256 000 tokens takes twice the memory of their logits.
        rows = [np.argsort(-row, kind="stable")[:top] for row in logits.reshape(-1, logits.shape[-1])]
        ids = np.stack(rows).reshape(*logits.shape[:-1], -1)
        values = np.take_along_axis(logits, ids, -1)
        return cls(case, tokens, lengths, past_lengths, slots, logits.shape[1], ids, values)

    def rows(self, first: int, count: int) -> GoldenStep | None:
        """The rows of slots first..first+count-1, renumbered from 0; None where it has none of them."""
        own = (self.slots >= first) & (self.slots < first + count)
        if not own.any():
            return None
        names = ("tokens", "lengths", "past_lengths", "top_ids", "top_logits")
        arrays = {name: getattr(self, name)[own] for name in names}
        return GoldenStep(self.case, slots=self.slots[own] - first, keep=self.keep, **arrays)


@dataclass(frozen=True)
class Golden:
    """Steps to run in order on one session of `slots` × `capacity`; the largest difference that passes."""

    slots: int
    capacity: int
    limit: float
    steps: Sequence[GoldenStep]

    def save(self, path: Path) -> None:
        """Write the cases as a compressed npz."""
        arrays: dict[str, NDArray[Any]] = {
            "schema": np.array(1),
            "slots": np.array(self.slots),
            "capacity": np.array(self.capacity),
            "limit": np.array(self.limit),
            "cases": np.array([step.case for step in self.steps]),
        }
        for i, step in enumerate(self.steps):
            arrays |= {f"{i}.{name}": np.asarray(getattr(step, name)) for name in _STEP_ARRAYS}
        np.savez_compressed(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the cases.

        Raises:
            UserError: the file is damaged, of another schema, or holds cases of a graph without a cache.
        """
        with reading(path, STEPS) as arrays:
            steps = [GoldenStep(str(case), **_step_arrays(arrays, i)) for i, case in enumerate(arrays["cases"])]
            return cls(int(arrays["slots"]), int(arrays["capacity"]), float(arrays["limit"]), steps)


@dataclass(frozen=True)
class SelftestResult:
    """What a bundle did on this machine; `choice` says why this backend, where there was a choice."""

    evaluated_by: str
    comparisons: list[Comparison]
    choice: str = ""

    @property
    def passed(self) -> bool:
        """Whether every comparison passed."""
        return all(comparison.passed for comparison in self.comparisons)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the command `selftest`: that of `verify`."""
        return Parity(evaluated_by=self.evaluated_by, passed=self.passed, comparisons=tuple(self.comparisons)).report()


def selftest(
    path: str | Path, *, backend: str = "auto", device: str | None = None, threads: int | None = None
) -> SelftestResult:
    """Check a bundle on this machine: every file's hash, then, where those agree, every golden case.

    Raises:
        UserError: the bundle cannot be opened or run, or has no golden cases.
    """
    bundle = Bundle.open(path)
    files = list(_compare_files(bundle))
    if not all(comparison.passed for comparison in files):
        return SelftestResult("sha256", files)  # what differs from what was exported need not be run
    session: Session | ForwardSession
    if bundle.manifest.task == "text-generation":
        golden = Golden.load(bundle.file(GOLDEN))
        session = open_session(bundle, backend=backend, device=device, slots=1, capacity=1, threads=threads)
        replayed = replay(session, golden)
    else:
        cases = GoldenForward.load(bundle.file(GOLDEN))
        session = open_forward(bundle, backend=backend, device=device, threads=threads)
        replayed = replay_forward(session, cases)
    comparisons = [*files, *replayed]
    result = SelftestResult(f"{session.backend} {session.version}", comparisons, session.choice)
    if result.passed:
        _remember(bundle, session)
    return result


def replay(session: Session, golden: Golden) -> list[Comparison]:
    """Run the golden steps on a cache of their own, the rows apart where the session takes fewer at once.

    The value compared is the largest of |Δ| over the recorded logits, and of how far any other token's logit
    rises above the smallest recorded one. A logit that is not finite fails.

    Raises:
        UserError: the session's capacity is smaller than the cases need.
    """
    width = min(golden.slots, session.max_slots or golden.slots)
    comparisons = []
    for first in range(0, golden.slots, width):
        opened = session.reopen(slots=width, capacity=golden.capacity)
        steps = (step.rows(first, width) for step in golden.steps)
        comparisons += [_compare(opened, step, golden.limit) for step in steps if step is not None]
    return comparisons


def prove(bundle: Bundle, session: Session) -> None:
    """Replay the golden steps unless this bundle is known to pass on this device with this backend's version.

    A bundle without golden cases (exported with --no-verify) has nothing to prove.

    Raises:
        CheckFailed: the replay differs: what this machine computes is not the exported model.
    """
    if bundle.has(GOLDEN) and not _record_path(bundle, session).is_file():
        _judge(bundle, session, replay(session, Golden.load(bundle.file(GOLDEN))))


def prove_forward(bundle: Bundle, session: ForwardSession) -> None:
    """As `prove`, for a graph without a cache of any other task than text-generation.

    Raises:
        CheckFailed: the replay differs: what this machine computes is not the exported model.
    """
    if bundle.has(GOLDEN) and not _record_path(bundle, session).is_file():
        _judge(bundle, session, replay_forward(session, GoldenForward.load(bundle.file(GOLDEN))))


def _judge(bundle: Bundle, session: Session | ForwardSession, comparisons: list[Comparison]) -> None:
    failed = next((comparison for comparison in comparisons if not comparison.passed), None)
    if failed is not None:
        raise CheckFailed(
            f"{bundle.path} on {session.backend} {session.version} is not the exported model: {failed.name} of "
            f"{failed.case!r} differ by {failed.value}, limit {failed.limit:.1e}; "
            "run nemotron-export selftest, then copy or export the bundle again"
        )
    _remember(bundle, session)


def _compare_files(bundle: Bundle) -> Iterator[Comparison]:
    changed = bundle.changed_files()
    for name in bundle.manifest.files:
        value, passed = float(name in changed), name not in changed
        yield Comparison(name=name, case="files", metric="sha256_differs", value=value, limit=0.0, passed=passed)


def _compare(session: Session, step: GoldenStep, limit: float) -> Comparison:
    logits = session.step(step.tokens, step.lengths, step.past_lengths, step.slots, step.keep)
    difference = np.abs(np.take_along_axis(logits, step.top_ids, -1) - step.top_logits).max()
    others = logits.copy()
    np.put_along_axis(others, step.top_ids, -np.inf, -1)
    excess = (others.max(-1) - step.top_logits[..., -1]).max()
    finite = bool(np.isfinite(logits).all())
    value = max(float(difference), float(excess)) if finite else None
    return Comparison(
        name="logits",
        case=step.case,
        metric="max_abs",
        value=value,
        limit=limit,
        passed=value is not None and value <= limit,
    )


def _step_arrays(arrays: Any, step: int) -> dict[str, Any]:
    found = {name: arrays[f"{step}.{name}"] for name in _STEP_ARRAYS}
    return {**found, "keep": int(found["keep"])}


def _remember(bundle: Bundle, session: Session | ForwardSession) -> None:
    path = _record_path(bundle, session)
    record = {"backend": session.backend, "version": session.version, "device": session.device}
    with suppress(OSError):  # where nothing can be remembered, the next load checks again
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"schema": 1, "bundle": bundle.path.name, **record}), encoding="utf-8")
        partial.replace(path)


def _record_path(bundle: Bundle, session: Session | ForwardSession) -> Path:
    """Where a pass of these files on this device with this version is remembered."""
    hashes = sorted((name, record.sha256) for name, record in bundle.manifest.files.items())
    key = json.dumps([hashes, session.backend, session.version, session.device])
    home = os.environ.get("XDG_CACHE_HOME", "")
    cache = Path(home if Path(home).is_absolute() else os.path.expanduser("~/.cache"))
    return cache / "nemotron-export" / "selftest" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
