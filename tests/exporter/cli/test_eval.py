"""`eval`: numbers in a table or as one JSON object, refusals in one line, and nothing else on the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager
from lm_eval_tasks import write_tasks

from exporter.harness.published import SETS, Published


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, tiny_checkpoint) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), tiny_checkpoint / "heldout.txt")


def test_json_has_the_keys_of_the_contract(cli, tiny_bundle, tasks):
    outcome = cli("eval", tiny_bundle, "--include-path", tasks, "--tasks", "tiny_choice", "--limit", 0.1, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert list(report) == [
        *("schema", "bundle", "backend", "lm_eval", "max_length", "reference", "tasks", "not_run", "tokens", "seconds")
    ]
    assert list(report["tasks"][0]) == ["name", "asked", "shots", "documents", "metrics", "agreement"]
    assert report["tasks"][0]["documents"] == 3  # of 24, rounded up
    assert list(report["tasks"][0]["metrics"][0]) == [
        *("metric", "filter", "value", "stderr", "reference", "published")
    ]


def test_the_terminal_shows_the_table_and_our_own_stages_alone(tiny_bundle, tasks, process):
    shown = process(
        *("eval", tiny_bundle, "--include-path", tasks, "--tasks", "tiny,tiny_answer", "--limit", "6"),
    )
    assert shown.returncode == 0
    names = [line.split()[0] for line in shown.stdout.splitlines()]
    assert names == ["task", "tiny_choice", "tiny_choice", "tiny_text", "tiny_text", "tiny_answer"]
    told = [line.split()[0] for line in shown.stderr.splitlines()]
    assert told[:5] == ["tasks", "documents", "load", "loglikelihood", "generate"]
    assert "tokens asked for" in shown.stderr.splitlines()[-1]
    assert len(told) == 6


def test_the_checkpoint_is_asked_the_same_beside_it(cli, tiny_bundle, tiny_checkpoint, tasks, tmp_path):
    file = tmp_path / "report.json"
    outcome = cli(
        *("eval", tiny_bundle, "--include-path", tasks, "--tasks", "tiny_choice", "--tasks", "tiny_answer"),
        *("--reference", tiny_checkpoint, "--limit", 4, "--num-fewshot", 1, "--output", file),
    )
    assert outcome.code == 0, outcome.err
    assert "transformers  " in outcome.out.splitlines()[0]
    assert outcome.out.count("0 of 4") == 3
    report = json.loads(file.read_text())
    assert report["reference"] == {"checkpoint": str(tiny_checkpoint), "dtype": "fp32"}
    choice = report["tasks"][0]
    assert (choice["name"], choice["shots"], choice["documents"]) == ("tiny_choice", 1, 4)
    assert choice["metrics"][0]["reference"]["difference"] == 0
    assert choice["agreement"]["different"] == 0
    assert report["tokens"]["computed"] < report["tokens"]["asked"]


def test_a_set_shows_published_numbers_and_what_was_not_run(cli, tiny_bundle, tasks, monkeypatch):
    def few(include_path=None, include_defaults=True):
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("exporter.harness.tasks.TaskManager", few)
    own = Published("tiny_choice", 0, "acc", "none", 0.586)
    monkeypatch.setitem(SETS, "own", (own, Published("xlsum_en", 3, "rougeL", "none", 0.295)))
    outcome = cli("eval", tiny_bundle, "--include-path", tasks, "--tasks", "own", "--limit", 4)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].endswith("published")
    assert lines[1].endswith("0.586")
    assert lines[2].endswith("-")
    assert lines[3].startswith("not run: xlsum_en (published 0.295): lm-eval has no such task")


def test_lm_eval_that_is_not_installed_is_one_line_with_the_remedy(cli, tiny_bundle, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("exporter.harness")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    outcome = cli("eval", tiny_bundle, "--tasks", "mmlu")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "error: lm_eval is not installed; pip install 'nemotron-export[eval]'\n"


def test_another_checkpoint_is_refused_before_anything_runs(cli, tiny_bundle, tasks, tmp_path):
    from checkpoints import write_checkpoint

    other = write_checkpoint(tmp_path / "other")
    outcome = cli("eval", tiny_bundle, "--include-path", tasks, "--tasks", "tiny_choice", "--reference", other)
    assert (outcome.code, outcome.out) == (2, "")
    assert "was not made from" in outcome.err
    assert "load" not in outcome.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--tasks", "a,,b"), "is not a list of names such as mmlu,hellaswag"),
        ((), "Missing option '--tasks'"),
        (("--tasks", "a", "--gen-kwargs", "fast"), "'fast' is not a setting such as max_gen_toks=64"),
        (("--tasks", "a", "--revision", "v1"), "--revision is of the checkpoint; give that with --reference"),
        (("--tasks", "a", "--output", "/nowhere/report.json"), "give a file in a directory that is there"),
        (("--tasks", "a", "--include-path", "/nowhere"), "--include-path /nowhere is not a directory"),
        (("--tasks", "a", "--reference", "/nowhere"), "/nowhere is not a directory"),
    ],
)
def test_what_is_mistyped_is_refused_before_a_model_is_loaded(cli, tiny_bundle, arguments, told):
    outcome = cli("eval", tiny_bundle, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert told in outcome.err
    assert "load" not in outcome.err.replace("loaded", "").replace("download", "")


def test_a_bundle_for_another_task_is_refused(cli, tmp_path):
    from forward_bundles import Toy

    path = Toy("text-classification").write(tmp_path / "toy", golden=True)
    outcome = cli("eval", path, "--tasks", "mmlu")
    assert outcome.code == 2
    assert "text-classification" in outcome.err
