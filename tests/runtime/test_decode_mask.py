"""In a decode step, a mask of the cache's whole capacity is as good as one that ends with the longest row.

It is what steps of one shape need. The oracle is the same bundle with the short mask, on ONNX Runtime's CPU kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint

from exporter.export import ExportOptions, export
from runtime.bundle import Bundle
from runtime.contract import ATTENTION_MASK
from runtime.ort_session import OrtSession
from runtime.steps import GraphContract, Step

SLOTS, CAPACITY = 4, 24


@dataclass
class WholeMasks:
    """A contract whose decode steps have the mask of the capacity, as on a GPU."""

    base: GraphContract
    widths: list[int]

    def split(self, step: Step, capacity: int) -> list[slice]:
        return self.base.split(step, capacity)

    def feeds(self, step: Step, capacity: int | None = None) -> Mapping[str, Any]:
        feeds = self.base.feeds(step, CAPACITY if step.tokens.shape[1] == 1 else None)
        self.widths.append(feeds[ATTENTION_MASK].shape[1])
        return feeds


@pytest.fixture(scope="module")
def rotated_apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose rotation is an operator of its own, which reads positions that come of the mask."""
    place = tmp_path_factory.mktemp("apart")
    checkpoint = write_checkpoint(place / "checkpoint", partial_rotary_factor=0.75)
    return export(checkpoint, place / "bundle", ExportOptions(verify=False)).bundle


@pytest.fixture(params=["tiny_bundle", "int8_cache_bundle", "rotated_apart"])
def sessions(request: pytest.FixtureRequest) -> tuple[OrtSession, OrtSession]:
    """The same bundle with short masks, and with whole ones."""
    bundle = Bundle.open(request.getfixturevalue(request.param))
    short, whole = (OrtSession(bundle, slots=SLOTS, capacity=CAPACITY) for _ in range(2))
    whole._contract = WholeMasks(whole._contract, [])
    return short, whole


def both(sessions: tuple[OrtSession, OrtSession], *step: Any, **options: Any) -> None:
    short, whole = (session.step(*step, **options) for session in sessions)
    assert (whole == short).all()
    assert np.isfinite(short).all()


def test_steps_after_prompts_of_unequal_length_are_the_same_up_to_the_last_place(
    sessions: tuple[OrtSession, OrtSession],
) -> None:
    random = np.random.default_rng(0)
    lengths = np.array([17, 2, 11, 1])
    both(sessions, random.integers(3, 60, (4, 17)), lengths, lengths * 0)
    for step in range(CAPACITY - 17):
        both(sessions, random.integers(3, 60, (4, 1)), lengths // lengths, lengths + step)
    caches = zip(*(session.cache.read(1) for session in sessions), strict=True)
    for short, whole in caches:
        np.testing.assert_allclose(whole.astype(float), short.astype(float), rtol=0, atol=1e-6)
    contract = sessions[1]._contract
    assert isinstance(contract, WholeMasks)
    assert set(contract.widths[1:]) == {CAPACITY}


def test_a_first_token_alone_is_the_same(sessions: tuple[OrtSession, OrtSession]) -> None:
    """Without a past the short mask makes it a prompt to the attention, the whole one does not."""
    one = np.ones(3, np.int64)
    both(sessions, np.array([[5], [6], [7]]), one, one - 1)
    both(sessions, np.array([[8], [9]]), one[:2], one[:2], slots=np.array([1, 2]))


def test_a_row_that_is_padded_on_the_left_still_gets_nan(sessions: tuple[OrtSession, OrtSession]) -> None:
    _, whole = sessions
    one = np.ones(2, np.int64)
    step = Step(np.array([[5], [6]]), one, one * 3, np.arange(2), 1)
    feeds = dict(whole._contract.feeds(step, CAPACITY))
    feeds[ATTENTION_MASK][1, 0] = 0
    logits = np.empty((2, 1, whole.vocab_size), np.float32)
    whole._bound(0, 2, decodes=False).run(feeds, logits, declared=True)
    assert np.isnan(logits[1]).all()
    assert np.isfinite(logits[0]).all()
