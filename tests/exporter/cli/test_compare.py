from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import UserError
from runtime.manifest import Manifest, Source
from runtime.measured import Quality

QUALITY = Quality(
    text="heldout.txt", tokens=4096, perplexity=3.25, reference_perplexity=3.2, kl_mean=0.0123, kl_p99=0.456, top1=0.987
)


def edit(bundle: Path, **values: Any) -> Path:
    replace(Manifest.load(bundle), **values).save(bundle)
    return bundle


@pytest.fixture
def pair(tiny_bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A bundle without a record, and one that says it is 16 bit and has one."""
    plain, measured = (Path(shutil.copytree(tiny_bundle, tmp_path / name)) for name in ("plain", "measured"))
    return plain, edit(measured, precision="fp16", quality=QUALITY)


def model_bytes(bundle: Path) -> int:
    return sum((bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


def test_bundles_stand_side_by_side(cli, pair):
    outcome = cli("compare", *pair, "--no-speed")
    assert outcome.code == 0
    header, first, second = outcome.out.splitlines()
    assert header.split() == [
        *("name", "target", "precision", "size", "perplexity", "KL", "mean", "KL", "p99", "top1", "tokens/s"),
    ]
    weight = f"{model_bytes(pair[0]) / 1e6:.1f} MB"
    assert first.split() == ["plain", "onnxruntime", "fp32", *weight.split(), *"-----"]
    assert second.split() == [
        *("measured", "onnxruntime", "fp16", *weight.split()),
        *("3.250", "1.23e-02", "4.56e-01", "98.7", "%", "-"),
    ]
    assert "plain: has no quality record; nemotron-export export at a precision below fp32 measures it" in outcome.err
    assert "measured:" not in outcome.err


def test_the_json_holds_the_records(cli, pair):
    report = json.loads(cli("compare", *pair, "--no-speed", "--json").out)
    assert report["schema"] == 1
    plain, measured = report["bundles"]
    assert (plain["name"], plain["quality"], plain["tokens_per_s"]) == ("plain", None, None)
    assert measured["quality"] == QUALITY.to_json()
    assert set(measured["quality"]) == {
        *("text", "tokens", "perplexity", "reference_perplexity", "kl_mean", "kl_p99", "top1"),
    }
    assert (measured["target"], measured["precision"]) == ("onnxruntime", "fp16")
    assert measured["model_bytes"] == model_bytes(pair[1])
    assert measured["notes"] == []


def test_speed_is_of_the_bundles_own_runtime(cli, tiny_bundle):
    outcome = cli("compare", tiny_bundle, "--json")
    (bundle,) = json.loads(outcome.out)["bundles"]
    assert bundle["tokens_per_s"] > 0
    assert bundle["backend"] == "onnxruntime-cpu"
    assert "speed" not in outcome.err


def test_a_bundle_that_does_not_run_here_has_no_speed_and_says_why(cli, pair, monkeypatch):
    def load(path: Path, **options: Any) -> Any:
        raise UserError("no engine for this GPU; build one")

    monkeypatch.setattr("runtime.load", load)
    outcome = cli("compare", pair[1])
    assert outcome.code == 0
    assert outcome.out.splitlines()[1].split()[-1] == "-"
    assert "measured: speed not measured: no engine for this GPU; build one" in outcome.err


def test_bundles_of_one_name_are_told_apart(cli, pair, tmp_path):
    other = Path(shutil.copytree(pair[1], tmp_path / "other" / "measured"))
    report = json.loads(cli("compare", pair[1], other, "--no-speed", "--json").out)
    assert [bundle["name"] for bundle in report["bundles"]] == [str(pair[1]), str(other)]


def test_what_is_hard_to_compare_is_said(cli, pair):
    plain, measured = pair
    edit(plain, source=Source(name="another", fingerprint="0123456789abcdef"), quality=replace(QUALITY, tokens=512))
    outcome = cli("compare", plain, measured, "--no-speed")
    assert outcome.code == 0
    assert "of different checkpoints" in outcome.err
    assert "another (0123456789ab)" in outcome.err
    assert "on different texts: 512 tokens of heldout.txt, 4096 tokens of heldout.txt" in outcome.err


def test_brackets_in_a_name_are_no_markup(cli, pair, tmp_path):
    named = Path(shutil.copytree(pair[1], tmp_path / "[bold]int4 $x$"))
    outcome = cli("compare", named, "--no-speed", "--plot", tmp_path / "plot.svg")
    assert outcome.code == 0
    assert "[bold]int4 $x$" in outcome.out
    assert "[bold]int4 $x$" in (tmp_path / "plot.svg").read_text()


def test_the_plot_is_drawn_and_says_who_is_not_in_it(cli, pair, tmp_path):
    svg, png = tmp_path / "plot.svg", tmp_path / "plot.PNG"
    for path in (svg, png):
        outcome = cli("compare", *pair, "--no-speed", "--plot", path)
        assert outcome.code == 0, outcome.err
        assert "plain: not in the plot" in outcome.err
        assert f"wrote {path}" in outcome.err
    assert png.read_bytes().startswith(b"\x89PNG")
    drawn = svg.read_text()
    assert all(words in drawn for words in (">measured<", "model (MB)", "mean KL"))
    assert ">plain<" not in drawn


def test_a_plot_is_the_same_each_time(cli, pair, tmp_path):
    paths = [tmp_path / "1.svg", tmp_path / "2.svg"]
    for path in paths:
        cli("compare", *pair, "--no-speed", "--plot", path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("plot.pdf", "ends in .svg or .png"),
        ("nowhere/plot.svg", "in a directory that is there"),
        ("directory.svg", "a directory; give a file in it"),
    ],
)
def test_a_plot_that_cannot_be_is_refused_first(cli, pair, tmp_path, file, words):
    (tmp_path / "directory.svg").mkdir()
    outcome = cli("compare", *pair, "--plot", tmp_path / file)
    assert (outcome.code, outcome.out) == (2, "")
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_without_matplotlib_the_plot_names_what_to_install(cli, pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    outcome = cli("compare", *pair, "--plot", tmp_path / "plot.svg")
    assert outcome.code == 2
    assert outcome.err == "error: matplotlib is not installed; pip install 'nemotron-export[plot]'\n"
    assert cli("compare", *pair, "--no-speed").code == 0


def test_a_plot_of_nothing_is_refused(cli, pair, tmp_path):
    outcome = cli("compare", pair[0], "--no-speed", "--plot", tmp_path / "plot.svg")
    assert (outcome.code, outcome.out) == (2, "")
    assert "nothing to plot" in outcome.err
    assert not (tmp_path / "plot.svg").exists()


def test_what_is_no_bundle_is_refused(cli, pair, tiny_checkpoint):
    assert cli("compare").code == 2
    outcome = cli("compare", pair[0], tiny_checkpoint)
    assert (outcome.code, outcome.out) == (2, "")
    assert "a checkpoint, not a bundle" in outcome.err
