"""The oracle is transformers' own processors, built as its `generate` builds them."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from runtime.errors import CheckFailed, UserError
from runtime.sampling import Sampler, Sampling, candidates, penalise

VOCAB = 50


def transformers_scores(logits: np.ndarray, seen: list[int], sampling: Sampling) -> np.ndarray:
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
    )
    steps: list[Any] = []
    if config.repetition_penalty != 1.0:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.temperature != 1.0:
        steps.append(hf.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(hf.TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        steps.append(hf.TopPLogitsWarper(config.top_p))
    if config.min_p:
        steps.append(hf.MinPLogitsWarper(config.min_p))
    processors = hf.LogitsProcessorList(steps)
    return processors(torch.tensor([seen]), torch.tensor(logits[None]))[0].numpy()


def our_scores(logits: np.ndarray, seen: list[int], sampling: Sampling) -> np.ndarray:
    tokens, scores = candidates(penalise(logits, np.unique(seen), sampling.repetition_penalty), sampling)
    dense = np.full(len(logits), -np.inf, np.float32)
    dense[tokens] = scores
    return dense


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 49, 50, 80]),
    top_p=st.sampled_from([0.05, 0.5, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.04, 0.5, 1.0]),
    penalty=st.sampled_from([0.8, 1.0, 1.3]),
)
def test_scores_are_those_of_transformers(
    *, seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, VOCAB).astype(np.float32)
    seen = random.integers(0, VOCAB, 12).tolist()
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
    ours, theirs = our_scores(logits, seen, sampling), transformers_scores(logits, seen, sampling)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("cuts", [{"top_k": 50, "top_p": 0.9}, {"top_k": 9000}, {"top_p": 0.9}, {"top_p": 0.3}])
@pytest.mark.parametrize("shape", ["peaked", "spread", "flat", "tied"])
def test_a_large_vocabulary_is_cut_as_by_transformers(shape: str, cuts: dict[str, Any]) -> None:
    """What is sorted there is a part: how large it must be depends on the logits. Which ties go is torch's affair."""
    random = np.random.default_rng(0)
    logits = {
        "peaked": np.where(random.random(30_000) < 1e-3, 20, 0) + random.normal(0, 2, 30_000),
        "spread": random.normal(0, 3, 30_000),
        "flat": random.normal(0, 1e-2, 30_000),
        "tied": random.integers(0, 9, 30_000),
    }[shape].astype(np.float32)
    sampling = Sampling(temperature=0.7, **{"top_k": 0, **cuts})
    ours, theirs = our_scores(logits, [0], sampling), transformers_scores(logits, [0], sampling)
    np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=1e-6)


def test_tokens_that_tie_with_the_last_of_top_k_stay_as_in_transformers() -> None:
    logits = np.array([1, 3, 2, 2, 0], np.float32)
    sampling = Sampling(temperature=1.0, top_k=2)
    np.testing.assert_array_equal(our_scores(logits, [0], sampling), transformers_scores(logits, [0], sampling))


def test_draws_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=7), [0])
    counts = np.bincount([sampler.choose(logits) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.015)


def test_draws_from_a_large_vocabulary_follow_the_probabilities() -> None:
    logits = np.repeat(np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), 700)
    sampler = Sampler(Sampling(temperature=1.0, seed=7), [0])
    drawn = np.array([sampler.choose(logits) for _ in range(20_000)])
    np.testing.assert_allclose(np.bincount(drawn // 700, minlength=4) / 20_000, [0.5, 0.3, 0.15, 0.05], atol=0.015)
    assert len(np.unique(drawn % 700)) == 700


def test_temperature_zero_takes_the_most_likely_token_after_the_penalty() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    assert Sampler(Sampling(), [0]).choose(logits) == 0
    assert Sampler(Sampling(repetition_penalty=1.2), [0]).choose(logits) == 1


def test_a_temperature_too_small_to_divide_by_is_greedy() -> None:
    logits = np.array([20.0, 19.9, -10.0], np.float32)
    sampling = Sampling(temperature=1e-40, top_k=3, top_p=0.9, min_p=0.1, seed=0)
    assert Sampler(sampling, [0]).choose(logits) == 0


def test_a_generated_token_is_penalised_from_then_on() -> None:
    logits = np.array([2.0, 1.9, 1.8], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=1.5), [])
    assert [sampler.choose(logits) for _ in range(3)] == [0, 1, 2]
    np.testing.assert_array_equal(logits, np.array([2.0, 1.9, 1.8], np.float32))  # the caller's stay


def test_a_seed_gives_the_same_text_again_and_none_a_different_one() -> None:
    logits = np.zeros(1000, np.float32)

    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed), [0])
        return [sampler.choose(logits) for _ in range(8)]

    assert draws(3) == draws(3)
    assert draws(3) != draws(4)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_stop_the_text(bad: float) -> None:
    with pytest.raises(CheckFailed, match="not finite; run nemotron-export selftest"):
        Sampler(Sampling(), [0]).choose(np.array([1, bad], np.float32))


@pytest.mark.parametrize(
    "value",
    [
        {"temperature": -0.1}, {"temperature": np.nan}, {"temperature": np.inf}, {"top_k": -1},
        {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.5},
        {"repetition_penalty": 0.0}, {"seed": -1},
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_named(value: dict[str, float]) -> None:
    name = next(iter(value))
    with pytest.raises(UserError, match=rf"{name} should be .*; found"):
        Sampling(**value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "asked", "expected"),
    [
        ({}, {}, Sampling(top_k=50)),  # transformers' defaults: greedy
        ({"do_sample": True}, {}, Sampling(1.0, 50)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None}, {}, Sampling(0.6, 50, 0.9)),
        ({"do_sample": True, "temperature": 0.6}, {"greedy": True}, Sampling(0.0, 50)),
        ({"do_sample": False, "top_k": 7}, {"temperature": 0.5}, Sampling(0.5, 7)),
        ({}, {"top_p": 0.5, "seed": 1}, Sampling(1.0, 50, 0.5, seed=1)),
        ({"do_sample": True}, {"temperature": 0.0}, Sampling(0.0, 50)),
        ({"repetition_penalty": 1.1}, {}, Sampling(top_k=50, repetition_penalty=1.1)),
        ({}, {"repetition_penalty": 1.3, "min_p": 0.1}, Sampling(1.0, 50, 1.0, 0.1, 1.3)),
    ],
)
def test_the_caller_goes_before_the_checkpoint_before_the_defaults(
    config: dict[str, Any], asked: dict[str, Any], expected: Sampling
) -> None:
    assert Sampling.from_config(config, **asked) == expected
