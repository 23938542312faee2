from __future__ import annotations

import json


def test_a_bundle_proves_itself(cli, tiny_bundle):
    outcome = cli("selftest", tiny_bundle)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"passed: {tiny_bundle} on onnxruntime-cpu" in outcome.out


def test_json_has_the_keys_of_the_contract(cli, tiny_bundle):
    report = json.loads(cli("selftest", tiny_bundle, "--backend", "onnxruntime", "--threads", 1, "--json").out)
    assert list(report) == ["schema", "passed", "evaluated_by", "comparisons"]
    assert report["passed"] is True
    assert {"files", "prefill", "decode"} <= {row["case"] for row in report["comparisons"]}


def test_a_damaged_file_exits_1_and_is_named(cli, tiny_bundle_copy):
    file = tiny_bundle_copy / "chat_template.jinja"
    file.write_bytes(file.read_bytes().swapcase())
    outcome = cli("selftest", tiny_bundle_copy, "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["passed"] is False
    assert "chat_template.jinja (files)" in outcome.err
    assert outcome.err.count("\n") == 1
