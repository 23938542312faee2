"""Which of lm-eval's tasks are asked for: names checked before any model is loaded, then their documents."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from lm_eval.tasks import TaskManager

from exporter.harness.published import SETS, Published
from runtime.errors import UserError

FEWSHOT_SEED = 1234  # which examples a question is given; lm-eval's own
RUN_CODE = "--run-generated-code"


@dataclass(frozen=True)
class Chosen:
    """A task, group or tag of lm-eval's, and what was published of it where it was asked for in a set."""

    name: str
    published: Published | None = None


@dataclass(frozen=True)
class NotRun:
    """A task of a set that is left out, and why."""

    published: Published
    reason: str


@dataclass(frozen=True)
class Selection:
    """What will be run, and what of the sets that were asked for will not."""

    manager: Any
    chosen: tuple[Chosen, ...]
    not_run: tuple[NotRun, ...] = ()

    @property
    def remarks(self) -> list[str]:
        """Where a published number was not measured as it is here."""
        published = (item.published for item in self.chosen if item.published)
        return [f"{number.task}: {number.remark}" for number in published if number.remark]


def select(names: Sequence[str], include: Sequence[Path] = (), *, run_code: bool = False) -> Selection:
    """Find tasks by their names: lm-eval's, patterns of them (`mmlu_*`), those of own files, and sets of `published`.

    Args:
        names: each once.
        include: directories with task files of the user's own; code that those name is run.
        run_code: allow tasks that run what the model wrote.

    Raises:
        UserError: a name is unknown, nothing is left to run, or a task runs generated code and that is not allowed.
    """
    for directory in include:
        if not directory.is_dir():
            raise UserError(f"--include-path {directory} is not a directory; give the one that holds your task files")
    manager = _manager(names, include)
    chosen: list[Chosen] = []
    not_run: list[NotRun] = []
    for name in dict.fromkeys(names):
        if name in SETS and name not in manager.task_index:
            for published in SETS[name]:
                reason = _lacking(manager, published.task, run_code)
                if reason:
                    not_run.append(NotRun(published, reason))
                else:
                    chosen.append(Chosen(published.task, published))
            continue
        for found in _matching(manager, name):
            if not run_code and _runs_code(manager, found):
                raise _refused_code(found)
            chosen.append(Chosen(found))
    return Selection(manager, tuple(chosen), tuple(not_run))


def load(selection: Selection, shots: int | None, gen_kwargs: dict[str, Any], *, run_code: bool) -> dict[str, Any]:
    """The tasks with their documents, as `lm_eval.evaluate` takes them: "tasks", "groups", "group_map".

    Args:
        selection: by `select`.
        shots: examples for every task, in place of its own or its set's number; a task that fixes 0 keeps that.
        gen_kwargs: over those of tasks that generate.
        run_code: as `select` was given it.

    Raises:
        UserError: documents cannot be had, two names have a task in common, or one runs generated code.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for chosen in selection.chosen:
        with _documents_of(chosen.name):
            found = selection.manager.load([chosen.name])
        own = chosen.published.shots if chosen.published else None
        for name, task in found["tasks"].items():
            if name in loaded["tasks"]:
                raise UserError(f"task {name} is asked for twice, once by {chosen.name}; drop one of the two")
            if getattr(task, "UNSAFE_CODE", False) and not run_code:
                raise _refused_code(name)
            _configure(task, own if shots is None else shots, gen_kwargs)
        for part, content in loaded.items():
            content.update(found.get(part, {}))
    return loaded


def _configure(task: Any, shots: int | None, gen_kwargs: dict[str, Any]) -> None:
    """As `lm_eval.simple_evaluate` does it."""
    if gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=gen_kwargs, update=True)
    if shots is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _manager(names: Sequence[str], include: Sequence[Path]) -> Any:
    """lm-eval's index; of the user's own files alone where those have every task, for its 14 000 files take a while."""
    places = [str(directory.resolve()) for directory in include]
    if places:
        own = TaskManager(include_path=places, include_defaults=False)
        if all(_complete(own, name) for name in names):
            return own
    return TaskManager(include_path=places or None)


def _complete(manager: Any, name: str) -> bool:
    """Whether an index has a task, or a group with all that it is made of."""
    entry = manager.task_index.get(name)
    if entry is None:
        return False
    parts = (entry.cfg or {}).get("task")
    return not isinstance(parts, list) or all(isinstance(part, str) and _complete(manager, part) for part in parts)


def _matching(manager: Any, name: str) -> list[str]:
    found: list[str] = manager.match_tasks([name])
    if found:
        return found
    near = difflib.get_close_matches(name, [*manager.all_tasks, *SETS], n=3)
    raise UserError(
        f"there is no task {name!r}{' (near it: ' + ', '.join(near) + ')' if near else ''}; correct it, see "
        "`lm-eval ls tasks`, or name the directory of your own task file with --include-path"
    )


def _lacking(manager: Any, name: str, run_code: bool) -> str:
    if name not in manager.task_index:
        return "lm-eval has no such task; name the directory of your own with --include-path"
    if not run_code and _runs_code(manager, name):
        return f"it runs code that the model wrote; allow that with {RUN_CODE}"
    return ""


def _runs_code(manager: Any, name: str) -> bool:
    return bool((manager.task_index[name].cfg or {}).get("unsafe_code"))


def _refused_code(name: str) -> UserError:
    return UserError(
        f"task {name} runs code that the model wrote; allow that with {RUN_CODE}, on a machine where it can do no harm"
    )


@contextmanager
def _documents_of(name: str) -> Iterator[None]:
    """Say in one line that a task's documents are out of reach, or are none."""
    try:
        yield
    except (OSError, DatasetsError) as error:
        cause = error.__cause__ or error
        reason = (str(cause) or repr(cause)).splitlines()[0]
        raise UserError(
            f"task {name}: its documents cannot be loaded ({reason}); run it once where the hub is reached, which "
            "keeps them in the cache, or correct the task's file"
        ) from error
