from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open

import runtime
from runtime.manifest import Manifest

QUICK = ("--rounds", "2", "--new-tokens", "4", "--prompt-tokens", "8")


def test_a_step_reads_the_weights_but_for_the_embedding_and_the_cache_of_every_row(cli, tiny_bundle, tiny_checkpoint):
    with safe_open(tiny_checkpoint / "model.safetensors", "np") as file:
        numbers = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dict
    weights = 4 * (sum(numbers.values()) - numbers["model.embed_tokens.weight"])
    assert "lm_head.weight" in numbers
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    token = 4 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    outcome = cli("bench", tiny_bundle, *QUICK, "--batch-size", "1", "--batch-size", "3", "--json")
    for batch, speed in zip((1, 3), json.loads(outcome.out)["speeds"], strict=True):
        assert (speed["batch"], speed["prompt_tokens"]) == (batch, 8)
        assert speed["step_bytes"] - batch * token * (8 + 2) == pytest.approx(weights, rel=1e-3)


def test_the_share_is_of_what_the_bandwidth_measured_allows(cli, tiny_bundle):
    report = json.loads(cli("bench", tiny_bundle, *QUICK, "--batch-size", "2", "--json").out)
    (speed,) = report["speeds"]
    assert (report["schema"], report["new_tokens"], report["rounds"], report["peers"]) == (1, 4, 2, [])
    assert 1e8 < report["bandwidth_bytes_per_s"] < 1e13
    assert speed["roofline_tokens_per_s"] == pytest.approx(2 * report["bandwidth_bytes_per_s"] / speed["step_bytes"])
    assert speed["roofline_share"] == pytest.approx(speed["tokens_per_s"]["median"] / speed["roofline_tokens_per_s"])
    for figure in (speed["tokens_per_s"], speed["first_token_s"], speed["prompt_tokens_per_s"]):
        assert 0 < figure["least"] <= figure["median"] <= figure["most"]
    assert speed["prompt_tokens_per_s"]["most"] == pytest.approx(2 * 8 / speed["first_token_s"]["least"])
    assert report["start"]["imports_s"] > 0.1  # this very process has imported more than that
    assert all(report["start"][part] > 0 for part in ("load_s", "check_s", "first_token_s"))


def test_a_person_reads_one_line_a_case(cli, tiny_bundle):
    outcome = cli("bench", tiny_bundle, *QUICK, "--prompt-tokens", "16", "--batch-size", "1")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    head = next(number for number, line in enumerate(lines) if "roofline" in line)
    assert [line.split()[:2] for line in lines[head + 1 : head + 3]] == [["1", "8"], ["1", "16"]]
    assert lines[head + 3] == "4 new tokens a row; medians of 2 rounds (least–most)"


def test_a_bundle_that_does_not_tell_its_weights_has_no_roofline(cli, tiny_bundle_copy: Path):
    replace(Manifest.load(tiny_bundle_copy), step_bytes=None).save(tiny_bundle_copy)
    (speed,) = json.loads(cli("bench", tiny_bundle_copy, *QUICK, "--batch-size", "1", "--json").out)["speeds"]
    assert speed["tokens_per_s"]["median"] > 0
    assert (speed["step_bytes"], speed["roofline_tokens_per_s"], speed["roofline_share"]) == (None, None, None)


def test_without_being_asked_it_takes_short_and_long_prompts_alone_and_together(cli, tiny_bundle):
    report = json.loads(cli("bench", tiny_bundle, "--rounds", "1", "--new-tokens", "2", "--json").out)
    cases = [(speed["batch"], speed["prompt_tokens"]) for speed in report["speeds"]]
    assert cases == [(1, 32), (1, 510), (4, 32), (4, 510)]  # a row holds 512


def test_an_engine_that_takes_one_row_has_one_and_more_are_refused(cli, tiny_bundle, monkeypatch):
    model = runtime.load(tiny_bundle)
    model.max_slots = 1
    monkeypatch.setattr("runtime.load", lambda *_, **__: model)
    quick = ("--rounds", "1", "--new-tokens", "2", "--prompt-tokens", "8")
    report = json.loads(cli("bench", tiny_bundle, *quick, "--json").out)
    assert [speed["batch"] for speed in report["speeds"]] == [1]
    outcome = cli("bench", tiny_bundle, *quick, "--batch-size", "2")
    assert outcome.code == 2
    assert "a batch of 2 passes the 1 rows" in outcome.err


def test_rows_that_the_bundle_does_not_hold_are_refused(cli, tiny_bundle):
    outcome = cli("bench", tiny_bundle, "--prompt-tokens", "510", "--new-tokens", "8")
    assert outcome.code == 2
    assert "510 tokens and 8 new ones pass the 512" in outcome.err
