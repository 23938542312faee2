"""A bundle's benchmarks from the names of tasks to numbers, and its checkpoint's beside them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from exporter.harness.model import BundleLM
from exporter.harness.report import TaskReport, reports
from exporter.harness.run import Settings, open_tasks, run
from exporter.harness.scoring import Tokens
from exporter.harness.tasks import NotRun, Selection
from runtime import Placement, load

if TYPE_CHECKING:
    from exporter.checkpoint import Checkpoint

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        bundle: its directory.
        backend: what ran it.
        max_length: tokens of a row, of bundle and reference.
        remarks: what a user should know of the loaded bundle, and of published numbers that were not measured alike.
        reference: the checkpoint and the dtype it ran in, where one did.
        tasks: each with its numbers.
        not_run: tasks of a set that were left out.
        tokens: that the loglikelihoods of the bundle asked for and computed.
        seconds: that the bundle, and then the reference, took.
    """

    bundle: Path
    backend: str
    max_length: int
    remarks: list[str]
    reference: dict[str, str] | None
    tasks: list[TaskReport]
    not_run: tuple[NotRun, ...]
    tokens: Tokens
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the command `eval`."""
        left_out = [{"name": item.published.task, "reason": item.reason} for item in self.not_run]
        return {
            "schema": 1,
            "bundle": str(self.bundle),
            "backend": self.backend,
            "lm_eval": version("lm-eval"),
            "max_length": self.max_length,
            "reference": self.reference,
            "tasks": [task.to_json() for task in self.tasks],
            "not_run": left_out,
            "tokens": vars(self.tokens),
            "seconds": self.seconds,
        }


def evaluate_bundle(
    bundle: Path,
    selection: Selection,
    settings: Settings,
    progress: Progress = lambda *_: None,
    *,
    rows: int = 8,
    max_length: int | None = None,
    checkpoint: Checkpoint | None = None,
    dtype: str = "fp32",
    **placement: Unpack[Placement],
) -> Evaluation:
    """Run tasks on a bundle, and then on its checkpoint where that is given: one model in memory at a time.

    Args:
        bundle: the bundle's directory.
        selection: the tasks.
        settings: how they are run.
        progress: called with "documents", "load", "loglikelihood", "generate" and "reference", what is done and how
            much there is.
        rows: that run at once, at most.
        max_length: tokens of a row (default and maximum: the bundle's).
        checkpoint: which the bundle was made from, to run on transformers.
        dtype: of that.
        placement: where the bundle runs.

    Raises:
        UserError: the bundle cannot run here, or a task's documents cannot be had.
        CheckFailed: what the bundle computes is not the exported model, or not finite.
    """
    progress("documents", 0, 1)
    tasks = open_tasks(selection, settings)
    progress("load", 0, 1)
    started = time.perf_counter()
    model = load(bundle, task="text-generation", **placement)
    answering = BundleLM(model, batch_size=rows, max_length=max_length, progress=progress)
    ours, theirs = run(answering, tasks, settings), None
    backend, length, tokens = model.backend, answering.max_length, answering.tokens
    remarks = [*model.remarks, *selection.remarks]
    seconds = {"bundle": time.perf_counter() - started}
    if checkpoint is not None:
        del model, answering
        gc.collect()
        from exporter.harness.reference import ReferenceLM

        started = time.perf_counter()
        beside = ReferenceLM(checkpoint, dtype=dtype, max_length=length, progress=progress)
        theirs = run(beside, open_tasks(selection, settings), settings)
        seconds["reference"] = time.perf_counter() - started
    return Evaluation(
        bundle=bundle,
        backend=backend,
        max_length=length,
        remarks=remarks,
        reference=None if checkpoint is None else {"checkpoint": str(checkpoint.path), "dtype": dtype},
        tasks=reports(selection.chosen, ours, theirs),
        not_run=selection.not_run,
        tokens=tokens,
        seconds=seconds,
    )
