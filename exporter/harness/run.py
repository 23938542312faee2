"""Tasks run on a model, and the numbers that lm-eval makes of its answers."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate

from exporter.harness.tasks import Selection, load

SEEDS = (0, 1234)  # of Python's and numpy's draws; lm-eval's own
RESAMPLED = 1000  # draws for the standard error of a metric that has no formula


@dataclass(frozen=True)
class Settings:
    """How tasks are run.

    Attributes:
        shots: examples before each question, in place of the task's number.
        limit: documents of each task: a number, or below 1 a part of them.
        chat: put questions into the chat template, examples as turns of the chat.
        gen_kwargs: over those of tasks that generate.
        run_code: allow tasks that run what the model wrote.
    """

    shots: int | None = None
    limit: float | None = None
    chat: bool = False
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    run_code: bool = False


def open_tasks(selection: Selection, settings: Settings) -> dict[str, Any]:
    """The tasks with their documents, for one run; draws are those of `lm_eval.simple_evaluate`.

    Raises:
        UserError: documents cannot be had, two names have a task in common, or one runs generated code.
    """
    if settings.run_code:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    return load(selection, settings.shots, dict(settings.gen_kwargs), run_code=settings.run_code)


def run(model: LM, tasks: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What `lm_eval.evaluate` returns, samples included.

    Raises:
        UserError: a task asks for what the model does not do.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"  # standard errors by resampling: no fork beside a loaded model
    results: dict[str, Any] = evaluate(
        lm=model,
        task_dict=tasks,
        limit=settings.limit,
        bootstrap_iters=RESAMPLED,
        apply_chat_template=settings.chat,
        fewshot_as_multiturn=True,
        confirm_run_unsafe_code=settings.run_code,
    )
    return results
