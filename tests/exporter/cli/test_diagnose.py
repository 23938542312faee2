from __future__ import annotations

import json
import re
from pathlib import Path

import corruptions
import pytest
from checkpoints import write_checkpoint

from exporter.diagnose.page import colour, page
from exporter.diagnose.report import Report, Stage
from runtime.bundle import Bundle

IDS = "1,319,383,361,786,282"


@pytest.fixture
def wrong(tiny_bundle_copy: Path) -> Path:
    corruptions.corrupt(tiny_bundle_copy, corruptions.drop_plus_one)
    return tiny_bundle_copy


def test_a_right_bundle_exits_0_with_a_line_for_each_part(cli, tiny_bundle, tiny_checkpoint):
    outcome = cli("diagnose", tiny_bundle, tiny_checkpoint)
    assert outcome.code == 0
    names = re.findall(r"^  (\S+(?: \S+)?)  .* ok$", outcome.out, re.MULTILINE)
    assert names == ["embedding", *(f"layer {layer}" for layer in range(4)), "final norm", "logits"]
    assert f"no difference: {tiny_bundle} is {tiny_checkpoint}" in outcome.out


def test_a_wrong_bundle_exits_1_with_the_layer_and_the_cause(cli, wrong, tiny_checkpoint):
    outcome = cli("diagnose", wrong, tiny_checkpoint, "-p", "Our solar system is")
    assert outcome.code == 1
    assert "first: layer 1, MLP norm: +1 is not folded into its weight" in outcome.out
    assert f"error: {wrong} differs from {tiny_checkpoint}: layer 1, MLP norm: +1 is not" in outcome.err
    assert "no difference" not in outcome.out


def test_json_has_the_findings_and_every_stage(cli, wrong, tiny_checkpoint):
    outcome = cli("diagnose", wrong, tiny_checkpoint, "--ids", IDS, "--json")
    assert outcome.code == 1
    report = json.loads(outcome.out)
    assert list(report) == ["schema", "passed", "evaluated_by", "tokens", "stages", "findings"]
    assert report["tokens"] == [int(token) for token in IDS.split(",")]
    assert report["passed"] is False
    (finding,) = report["findings"]
    assert (finding["place"], finding["layer"], finding["tap"]) == ("layer 1", 1, "MLP norm")
    assert finding["cause"] == "plus_one_not_folded"
    assert set(finding["taps"]["MLP norm"]) == {"max_abs", "relative", "cosine", "limit", "passed"}
    assert [stage["alone"]["passed"] for stage in report["stages"]] == [True, True, False, True, True, True, True]


def test_the_page_has_a_heat_map_and_loads_nothing(cli, wrong, tiny_checkpoint, tmp_path):
    place = tmp_path / "page.html"
    assert cli("diagnose", wrong, tiny_checkpoint, "--ids", IDS, "--html", place).code == 1
    text = place.read_text(encoding="utf-8")
    assert not re.search(r"https?://|src=|<link|<script|@import|url\(", text)
    rows = re.findall(r"<tr><td class=.*?</tr>", text, re.DOTALL)
    assert len(rows) == 7 + 7 + 15
    assert all(row.count('<td class="cell"') == len(IDS.split(",")) for row in rows)
    assert "layer 1, MLP norm: +1 is not folded" in text


def test_a_token_that_is_markup_stays_text_on_the_page(tiny_bundle, monkeypatch):
    from exporter.diagnose.difference import difference

    torch = pytest.importorskip("torch")
    monkeypatch.setattr("runtime.tokenizer.Tokenizer.decode", lambda self, ids: "<script>alert(1)</script>")
    found = difference(torch.ones(1, 2), torch.full((1, 2), torch.inf))
    text = page(Report("x", [5], [Stage("layer 0", found, None)]), Bundle.open(tiny_bundle))
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "#000" in text  # what is not finite


def test_worse_is_darker():
    shades = [float(re.search(r"(\d+)%\)", colour(10.0**power))[1]) for power in range(-9, 2)]
    assert shades == sorted(shades, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "x", "--ids", "5"), "give -p TEXT or --ids 5,17,3, and not both"),
        (("-p", ""), "the prompt is empty"),
        (("--ids", "5,99999"), "token 99999 is not within the vocabulary of"),
        (("--ids", ",".join(["5"] * 513)), "the prompt has 513 tokens"),
        (("--html", "nowhere/page.html"), "nowhere is not a directory; give --html a file"),
        (("--network",), "is for onnxruntime; export it with --target tensorrt"),
    ],
)
def test_what_the_user_must_change_is_one_line(cli, tiny_bundle, tiny_checkpoint, arguments, message):
    outcome = cli("diagnose", tiny_bundle, tiny_checkpoint, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert message in outcome.err


def test_another_models_checkpoint_is_named(cli, tiny_bundle, tmp_path):
    other = write_checkpoint(tmp_path / "other")
    outcome = cli("diagnose", tiny_bundle, other)
    assert outcome.code == 2
    assert f"{tiny_bundle} and {other} are not of one model" in outcome.err
    assert "give the checkpoint that the bundle was made from" in outcome.err
