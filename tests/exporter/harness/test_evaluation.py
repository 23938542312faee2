"""The whole way from tasks to numbers gives what lm-eval gives for the checkpoint, and shows both side by side."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from checkpoints import write_checkpoint
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from exporter.checkpoint import Checkpoint
from exporter.harness.evaluation import evaluate_bundle
from exporter.harness.published import Published
from exporter.harness.reference import check_same_weights
from exporter.harness.run import Settings
from exporter.harness.tasks import Chosen, select
from runtime.bundle import Bundle
from runtime.errors import UserError

NAMES = ["tiny_choice", "tiny_text", "tiny_answer"]


@pytest.fixture(scope="module")
def evaluation(tiny_bundle, tiny_checkpoint, tiny_tasks):
    """Two examples before each question, and the checkpoint asked the same."""
    selection = select(NAMES, [tiny_tasks])
    checkpoint = Checkpoint.open(tiny_checkpoint)
    return evaluate_bundle(tiny_bundle, selection, Settings(shots=2), checkpoint=checkpoint, backend="onnxruntime")


def metrics(report):
    return {f"{metric.name},{metric.answers}": metric for metric in report.metrics}


def test_every_metric_is_what_lm_eval_makes_of_the_checkpoint(evaluation, oracle, tiny_tasks):
    manager = TaskManager(include_path=str(tiny_tasks), include_defaults=False)
    expected = simple_evaluate(model=oracle, tasks=NAMES, task_manager=manager, num_fewshot=2, bootstrap_iters=0)
    assert [task.name for task in evaluation.tasks] == NAMES
    for task in evaluation.tasks:
        values = {key: value for key, value in expected["results"][task.name].items() if key in metrics(task)}
        assert len(values) == len(task.metrics)
        for key, metric in metrics(task).items():
            assert metric.ours.value == pytest.approx(values[key], rel=1e-6)
            assert metric.reference.value == pytest.approx(values[key], rel=1e-6)
            assert abs(metric.difference) <= 1e-6 * max(1, values[key])
    accuracy = metrics(evaluation.tasks[0])["acc,none"].ours
    assert 0 < accuracy.value < 1
    assert accuracy.stderr == pytest.approx(math.sqrt(accuracy.value * (1 - accuracy.value) / 23))


def test_the_answers_of_both_are_compared_one_by_one(evaluation):
    choice, text, answer = (task.agreement for task in evaluation.tasks)
    assert (choice.documents, choice.different) == (24, 0)
    assert 0 < choice.loglikelihood < 1e-3
    assert text is None  # there is no answer to compare, the numbers say it all
    assert (answer.documents, answer.different, answer.loglikelihood) == (24, 0, None)


def test_the_examples_were_not_computed_for_every_question(evaluation):
    assert evaluation.tokens.computed < 0.7 * evaluation.tokens.asked


@pytest.mark.slow
def test_a_bundle_that_answers_otherwise_is_seen_to(tiny_checkpoint, tiny_tasks, tmp_path):
    from exporter.export import ExportOptions, export

    bundle = export(tiny_checkpoint, tmp_path / "int4", ExportOptions(precision="int4", verify=False)).bundle
    checkpoint = Checkpoint.open(tiny_checkpoint)
    found = evaluate_bundle(bundle, select(NAMES, [tiny_tasks]), Settings(), checkpoint=checkpoint)
    assert found.tasks[0].agreement.loglikelihood > 1e-2
    assert abs(metrics(found.tasks[1])["bits_per_byte,none"].difference) > 1e-4
    assert found.tasks[2].agreement.different > 0


def test_a_groups_tasks_and_a_limit_are_as_asked(tiny_bundle, tiny_tasks):
    found = evaluate_bundle(tiny_bundle, select(["tiny"], [tiny_tasks]), Settings(limit=3))
    assert [(task.name, task.asked, task.documents) for task in found.tasks] == [
        ("tiny_choice", True, 3),
        ("tiny_text", True, 3),
    ]


@pytest.mark.parametrize(("shots", "shown"), [(None, 0.5), (1, None)])
def test_a_published_number_is_shown_where_as_many_examples_are_given(tiny_bundle, tiny_tasks, shots, shown):
    selection = select(["tiny_choice"], [tiny_tasks])
    published = Published("tiny_choice", 2, "acc", "none", 0.5, "measured otherwise")
    selection = replace(selection, chosen=(Chosen("tiny_choice", published),))
    found = evaluate_bundle(tiny_bundle, selection, Settings(shots=shots, limit=2))
    assert metrics(found.tasks[0])["acc,none"].published == shown
    assert metrics(found.tasks[0])["acc_norm,none"].published is None
    assert found.remarks == ["tiny_choice: measured otherwise"]


def test_the_chat_template_is_put_around_questions(tiny_bundle, tiny_tasks, tiny_checkpoint):
    settings = Settings(chat=True, shots=1, limit=4)
    checkpoint = Checkpoint.open(tiny_checkpoint)
    selection = select(["tiny_choice", "tiny_answer"], [tiny_tasks])
    plain, chat = (
        evaluate_bundle(tiny_bundle, selection, given, checkpoint=checkpoint)
        for given in (Settings(shots=1, limit=4), settings)
    )
    assert chat.tokens.asked > plain.tokens.asked
    assert [task.agreement.different for task in chat.tasks] == [0, 0]
    assert chat.tasks[0].agreement.loglikelihood < 1e-3


def test_the_bundles_own_checkpoint_is_known_and_another_refused(tiny_bundle, tiny_checkpoint, tmp_path):
    bundle, told = Bundle.open(tiny_bundle), []
    check_same_weights(bundle, Checkpoint.open(tiny_checkpoint), lambda *step: told.append(step))
    assert told[-1][1] == told[-1][2] > 30
    other = Checkpoint.open(write_checkpoint(tmp_path / "other"))
    with pytest.raises(UserError, match=r"was not made from .*other: .* give the checkpoint .* tiny-nemotron$"):
        check_same_weights(bundle, other)
