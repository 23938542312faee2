from __future__ import annotations

import json

import pytest

from exporter.recipe import FORMS


@pytest.fixture(autouse=True)
def nothing_is_exported(monkeypatch):
    monkeypatch.setattr("exporter.trace.trace", None)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_every_precision_of_the_target_is_told(target, cli, tiny_checkpoint, tmp_path):
    outcome = cli("plan", tiny_checkpoint, tmp_path / "bundle", "--target", target, "--memory", "2GB", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["schema"] == 1
    assert report["parameters"] == 3_936_768
    assert report["checkpoint_bytes"] == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert report["memory_bytes"] == 2 * 10**9
    assert report["disk"]["path"] == str(tmp_path)
    assert [entry["precision"] for entry in report["precisions"]] == list(FORMS[target])
    assert all(rate > 0 for name, rate in report["measured"].items() if name != "converted_parameters_per_s")
    assert set(report["measured"]["converted_parameters_per_s"]) == set(FORMS[target])
    for entry in report["precisions"]:
        assert entry["bundle_bytes"] <= entry["disk_bytes"]
        assert set(entry["peak_bytes"]) == {"unchecked", "layer by layer", "whole"}
        assert entry["fits"]["longest"] == 512
        assert entry["seconds"]["weights"] > 0
    assert list(tmp_path.iterdir()) == []  # what was written to measure is gone


def test_the_figures_come_as_tables_that_say_what_was_measured(cli, tiny_checkpoint, tmp_path):
    options = ("--precision", "fp32", "--max-batch-size", "4", "--max-seq-len", "128", "--memory", "1GiB")
    out = cli("plan", tiny_checkpoint, tmp_path / "bundle", *options).out
    for words in (
        "3 936 768",
        "16.0 MB",
        "write with fsync",
        "GFLOP/s",
        "rows of 128 tokens",
        "tokens in each of 4 rows",
    ):
        assert words in out
    assert "int4" not in out


def test_memory_that_a_gate_would_exceed_is_marked(cli, tiny_checkpoint, tmp_path):
    out = cli("plan", tiny_checkpoint, tmp_path / "bundle", "--precision", "fp32", "--memory", "760MB").out
    assert "763.0 MB !" in out
    assert out.count(" !") == 1


def test_a_cache_of_int8_holds_more_tokens(cli, tiny_checkpoint, tmp_path):
    place = tmp_path / "bundle"
    plain, rounded = (
        json.loads(cli("plan", tiny_checkpoint, place, "--precision", "fp16", *more, "--json").out)["precisions"][0]
        for more in ((), ("--kv-cache", "int8"))
    )
    assert rounded["kv_bytes_per_token"] * 2 == plain["kv_bytes_per_token"] == 2048
    assert "calibration" in rounded["seconds"]


def test_the_gates_time_is_left_out_where_it_is(cli, tiny_checkpoint, tmp_path):
    options = ("--precision", "bf16", "--no-verify", "--json")
    report = json.loads(cli("plan", tiny_checkpoint, tmp_path / "bundle", *options).out)
    assert set(report["precisions"][0]["seconds"]) == {"start", "weights"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--memory", "24G"), ["'24G' is not a size", "known units: B, kB"]),
        (("--recipe", "cheap"), ["unknown recipe 'cheap'", "plain"]),
        (("--precision", "int8", "--target", "tensorrt"), ["no precision 'int8'", "fp8"]),
        (("--precision", "fp16", "--recipe", "aware"), ["recipe aware is of rounded weights"]),
        (("--max-batch-size", "0"), ["--max-batch-size", "x>=1"]),
    ],
)
def test_what_export_would_refuse_is_refused_alike(arguments, words, cli, tiny_checkpoint, tmp_path):
    outcome = cli("plan", tiny_checkpoint, tmp_path / "bundle", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert all(word in outcome.err for word in words)


def test_a_precision_that_this_checkpoint_cannot_have_is_told_with_its_reason(cli, tmp_path):
    from checkpoints import write_checkpoint

    checkpoint = write_checkpoint(tmp_path / "checkpoint")  # 64 and 96 wide: no whole blocks of 128
    outcome = cli("plan", checkpoint, tmp_path / "bundle", "--target", "tensorrt", "--json")
    found = {entry["precision"]: entry for entry in json.loads(outcome.out)["precisions"]}
    assert "not a whole number of blocks of 128" in found["int4"]["refused"]
    assert "bundle_bytes" in found["fp8"]
    assert "int4 is refused: " in cli("plan", checkpoint, tmp_path / "bundle", "--target", "tensorrt").out
    asked = cli("plan", checkpoint, tmp_path / "bundle", "--target", "tensorrt", "--precision", "int4")
    assert (asked.code, asked.out) == (2, "")


def test_a_pickled_checkpoint_is_told_of(cli, tmp_path):
    import torch
    from checkpoints import write_checkpoint
    from safetensors.torch import load_file

    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    options = ("--precision", "fp32", "--json")
    before = json.loads(cli("plan", checkpoint, *options).out)
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    after = json.loads(cli("plan", checkpoint, *options).out)
    assert after["parameters"] == before["parameters"]
    assert after["precisions"][0]["bundle_bytes"] == before["precisions"][0]["bundle_bytes"]
