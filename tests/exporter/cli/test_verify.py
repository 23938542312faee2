from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from runtime.measured import Comparison, Parity


@pytest.fixture
def verdict(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What the two comparisons of the next run find; then whether of the network, adapter, memory, and attention."""
    found = [True, True]

    def verify(bundle, checkpoint, progress, *, network, attention, adapter, memory) -> Parity:
        print("a library's chatter")
        progress("verify", 1, 2)
        found[2:] = [network, adapter, memory, attention]
        rows = tuple(
            Comparison(name="logits", case=str(n), metric="max_abs", value=None, limit=1e-4, passed=passed)
            for n, passed in enumerate(found[:2])
        )
        return Parity(evaluated_by="onnxruntime-cpu 1.32.0", passed=all(found[:2]), comparisons=rows)

    module = ModuleType("exporter.verify")
    module.verify = verify  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exporter.verify", module)
    monkeypatch.setattr("runtime.bundle.Bundle.open", lambda path: None)
    return found


def test_an_equal_bundle_passes(cli, verdict, tmp_path):
    outcome = cli("verify", "b", tmp_path)
    assert outcome.code == 0
    assert f"passed: b is {tmp_path}, on onnxruntime-cpu 1.32.0" in outcome.out


def test_a_different_bundle_exits_1_and_says_how_much_differs(cli, verdict, tmp_path):
    verdict[1] = False
    outcome = cli("verify", "b", tmp_path)
    assert outcome.code == 1
    assert "FAILED" in outcome.out
    assert "passed" not in outcome.out
    assert f"error: b differs from {tmp_path} in 1 of 2 comparisons" in outcome.err


@pytest.mark.parametrize("passed", [True, False])
def test_json_has_the_keys_of_the_contract_also_where_it_failed(cli, verdict, tmp_path, passed):
    verdict[1] = passed
    outcome = cli("verify", "b", tmp_path, "--json")
    report = json.loads(outcome.out)
    assert list(report) == ["schema", "passed", "evaluated_by", "comparisons"]
    assert report["passed"] is passed
    assert report["comparisons"][1] == {
        "name": "logits", "case": "1", "metric": "max_abs", "value": None, "limit": 1e-4, "passed": passed
    }  # fmt: skip


def test_the_network_is_checked_only_where_it_is_asked_for(cli, verdict, tmp_path):
    for arguments, network in ((), False), (("--network",), True):
        assert cli("verify", "b", tmp_path, *arguments).code == 0
        assert verdict[2] is network


def test_the_graph_with_the_kernels_ops_is_checked_where_it_is_asked_for(cli, verdict, tmp_path):
    for arguments, attention in ((), "native"), (("--attention", "plugin"), "plugin"):
        assert cli("verify", "b", tmp_path, *arguments).code == 0
        assert verdict[5] == attention


def test_the_choices_of_attention_are_what_the_builder_knows():
    from exporter.cli.verify import ATTENTIONS
    from exporter.engine_options import ATTENTIONS as KNOWN

    assert ATTENTIONS == KNOWN


def test_the_adapter_that_was_merged_arrives(cli, verdict, tmp_path):
    assert cli("verify", "b", tmp_path, "--adapter", tmp_path).code == 0
    assert verdict[3] == tmp_path


def test_the_memory_that_may_be_used_arrives(cli, verdict, tmp_path):
    assert cli("verify", "b", tmp_path, "--memory", "4GiB").code == 0
    assert verdict[4] == 4 * 2**30


def test_a_revision_of_a_directory_is_refused(cli, verdict, tmp_path):
    outcome = cli("verify", "b", tmp_path, "--revision", "v2")
    assert (outcome.code, outcome.out, verdict[2:]) == (2, "", [])
    assert "drop --revision" in outcome.err
