"""Tasks are found or refused by name, before a model is loaded; sets name what they leave out."""

from __future__ import annotations

from pathlib import Path

import lm_eval
import pytest
from lm_eval.tasks import TaskManager

from exporter.harness import tasks
from exporter.harness.published import SETS, Published
from exporter.harness.run import Settings, open_tasks
from exporter.harness.tasks import select
from runtime.errors import UserError

DEFAULTS = Path(lm_eval.__file__).parent / "tasks"
SET = (Published("tiny_choice", 2, "acc", "none", 0.5), Published("xlsum_en", 3, "rougeL", "none", 0.295))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval as if it came with a few of its tasks only: all 14 000 files take half a minute to look through."""
    places = [str(DEFAULTS / name) for name in ("hellaswag", "humaneval", "winogrande", "arc", "gsm8k")]

    def manager(include_path=None, include_defaults=True):
        return TaskManager(
            include_path=[*(places if include_defaults else []), *(include_path or [])], include_defaults=False
        )

    monkeypatch.setattr(tasks, "TaskManager", manager)


def test_an_unknown_task_is_refused_with_those_that_are_near(few):
    with pytest.raises(UserError, match=r"no task 'helaswag' \(near it: hellaswag\).*lm-eval ls tasks"):
        select(["helaswag"])


def test_own_tasks_groups_and_patterns_are_found(few, tiny_tasks):
    assert [item.name for item in select(["tiny_choice", "tiny"], [tiny_tasks]).chosen] == ["tiny_choice", "tiny"]
    assert {item.name for item in select(["arc_*"]).chosen} >= {"arc_easy", "arc_challenge"}


def test_own_tasks_need_no_look_through_lm_evals(tiny_tasks, monkeypatch):
    def manager(include_path, include_defaults):
        assert not include_defaults
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", manager)
    assert select(["tiny_choice", "tiny"], [tiny_tasks]).chosen


def test_a_task_that_runs_generated_code_needs_the_users_word(few):
    with pytest.raises(UserError, match=r"humaneval runs code that the model wrote.*--run-generated-code"):
        select(["humaneval"])
    assert select(["humaneval"], run_code=True).chosen[0].name == "humaneval"


def test_a_set_names_what_it_leaves_out(few, tiny_tasks, monkeypatch):
    monkeypatch.setitem(SETS, "tiny-set", (*SET, Published("humaneval", 0, "pass@1", "create_test", 0.2)))
    selection = select(["tiny-set"], [tiny_tasks])
    assert [item.published for item in selection.chosen] == [SET[0]]
    assert [(item.published.task, item.reason.split(";")[0]) for item in selection.not_run] == [
        ("xlsum_en", "lm-eval has no such task"),
        ("humaneval", "it runs code that the model wrote"),
    ]


def test_a_directory_that_is_none_is_refused():
    with pytest.raises(UserError, match="--include-path /nowhere is not a directory"):
        select(["tiny"], [Path("/nowhere")])


@pytest.mark.parametrize(
    ("shots", "expected"), [(None, {"tiny_choice": 2, "tiny_text": 0}), (1, {"tiny_choice": 1, "tiny_text": 1})]
)
def test_a_sets_examples_are_its_own_unless_the_user_says_how_many(few, tiny_tasks, monkeypatch, shots, expected):
    monkeypatch.setitem(SETS, "tiny-set", SET)
    selection = select(["tiny-set", "tiny_text"], [tiny_tasks])
    found = open_tasks(selection, Settings(shots=shots))["tasks"]
    assert {name: task.config.num_fewshot for name, task in found.items()} == expected


def test_wishes_for_generation_reach_the_tasks_that_generate(tiny_tasks):
    selection = select(["tiny_choice", "tiny_answer"], [tiny_tasks])
    found = open_tasks(selection, Settings(gen_kwargs={"max_gen_toks": 5}))["tasks"]
    assert found["tiny_answer"].config.generation_kwargs == {"until": ["."], "max_gen_toks": 5}


def test_a_task_asked_for_twice_is_refused(few, tiny_tasks):
    selection = select(["tiny_choice", "tiny"], [tiny_tasks])
    with pytest.raises(UserError, match="tiny_choice is asked for twice, once by tiny;"):
        open_tasks(selection, Settings())


def test_documents_out_of_reach_are_told_in_one_line(few):
    with pytest.raises(
        UserError, match=r"task hellaswag: its documents cannot be loaded .*Hub.* where the hub is reached"
    ):
        open_tasks(select(["hellaswag"]), Settings())


def test_documents_that_are_none_are_told_in_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text("no JSON\n")
    place = f"{{data_files: {tmp_path / 'bad.jsonl'}, cache_dir: {tmp_path / 'cache'}}}"
    (tmp_path / "bad.yaml").write_text(f"task: bad\ndataset_path: json\ndataset_kwargs: {place}\ntest_split: train\n")
    with pytest.raises(UserError, match=r"task bad: its documents cannot be loaded .*correct the task's file"):
        open_tasks(select(["bad"], [tmp_path]), Settings())


@pytest.mark.slow
def test_what_was_published_of_minitron_can_be_asked_for():
    selection = select(["minitron-4b"], run_code=True)
    assert [item.name for item in selection.chosen] == [
        *("mmlu", "hellaswag", "winogrande", "gsm8k", "arc_challenge", "humaneval")
    ]
    assert [item.published.task for item in selection.not_run] == ["xlsum_en"]
    assert [round(100 * item.value, 1) for item in SETS["minitron-4b"]] == [58.6, 75.0, 74.0, 24.1, 50.9, 29.5, 23.3]
