"""Each task's numbers, those of transformers and those published beside them, and where answers differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from exporter.harness.published import Published
from exporter.harness.tasks import Chosen

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """A metric's value and its standard error; None for what is no number."""

    value: float | None
    stderr: float | None

    def to_json(self) -> dict[str, Any]:
        """As part of a metric."""
        return {"value": self.value, "stderr": self.stderr}


@dataclass(frozen=True)
class Metric:
    """One number of a task.

    Attributes:
        name: lm-eval's name of it.
        answers: lm-eval's name of the filter that found the answers.
        ours: of the bundle.
        reference: of the checkpoint on transformers, where that was asked for.
        published: where a set has one, of as many examples.
    """

    name: str
    answers: str
    ours: Figure
    reference: Figure | None = None
    published: float | None = None

    @property
    def difference(self) -> float | None:
        """Ours less the reference."""
        if self.reference is None or self.ours.value is None or self.reference.value is None:
            return None
        return self.ours.value - self.reference.value

    def to_json(self) -> dict[str, Any]:
        """One of a task's `metrics`."""
        reference = self.reference and {**self.reference.to_json(), "difference": self.difference}
        about = {"metric": self.name, "filter": self.answers, **self.ours.to_json()}
        return {**about, "reference": reference, "published": self.published}


@dataclass(frozen=True)
class Agreement:
    """How alike bundle and checkpoint answered.

    Attributes:
        documents: whose answers were compared: the choice, or the text that was found.
        different: of them.
        loglikelihood: the largest difference of any log-probability, in nats; None of generated text.
    """

    documents: int
    different: int
    loglikelihood: float | None


@dataclass(frozen=True)
class TaskReport:
    """A task, or a group of tasks with numbers of its own.

    Attributes:
        asked: whether it is what the user named; else a part of that.
    """

    name: str
    asked: bool
    shots: int | None
    documents: int | None
    metrics: tuple[Metric, ...]
    agreement: Agreement | None = None

    def to_json(self) -> dict[str, Any]:
        """One of the `tasks` of the command's JSON object."""
        return {
            "name": self.name,
            "asked": self.asked,
            "shots": self.shots,
            "documents": self.documents,
            "metrics": [metric.to_json() for metric in self.metrics],
            "agreement": self.agreement and vars(self.agreement),
        }


def reports(chosen: tuple[Chosen, ...], ours: Results, reference: Results | None) -> list[TaskReport]:
    """Every task and group that has numbers, in lm-eval's order; what the user named is marked."""
    published = {item.name: item.published for item in chosen if item.published}
    named = {item.name for item in chosen}
    # A group without numbers of its own only holds its tasks together: then they are what the user asked for.
    numbered = {name: values for name, values in ours["results"].items() if any(_figures(values))}
    parts = {part for name in numbered for part in _below(name, ours)}
    found = []
    for name, values in numbered.items():
        report = TaskReport(
            name=name,
            asked=name in named or name not in parts,
            shots=ours["n-shot"].get(name),
            documents=(ours["n-samples"].get(name) or {}).get("effective"),
            metrics=tuple(Metric(metric, answers, figure) for (metric, answers), figure in _figures(values)),
        )
        if reference is not None:
            beside = dict(_figures(reference["results"][name]))
            report = replace(
                report,
                metrics=tuple(replace(m, reference=beside[m.name, m.answers]) for m in report.metrics),
                agreement=_agreement(name, ours, reference),
            )
        found.append(_with_published(report, published.get(name)))
    return found


def _with_published(report: TaskReport, published: Published | None) -> TaskReport:
    if published is None or published.shots != report.shots:
        return report
    of = (published.metric, published.answers)
    metrics = (replace(m, published=published.value) if (m.name, m.answers) == of else m for m in report.metrics)
    return replace(report, metrics=tuple(metrics))


def _figures(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Figure]]:
    """Metrics of lm-eval's `"acc,none": …, "acc_stderr,none": …`."""
    for key, value in values.items():
        metric, comma, answers = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield (metric, answers), Figure(_number(value), _number(values.get(f"{metric}_stderr,{answers}")))


def _number(value: object) -> float | None:
    """A finite number; lm-eval has "N/A" where there is no standard error."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None  # type: ignore[arg-type]


def _agreement(name: str, ours: Results, reference: Results) -> Agreement | None:
    """Of a task's documents, or of all of a group's tasks."""
    members = [task for task in (name, *_below(name, ours)) if task in ours["configs"]]
    pairs = [pair for task in members for pair in _pairs(task, ours, reference)]
    kinds = {ours["configs"][task]["output_type"] for task in members}
    if not pairs or "loglikelihood_rolling" in kinds:
        return None
    gaps = [abs(one - other) for kind, mine, theirs in pairs for one, other in _logprobs(kind, mine, theirs)]
    different = sum(_answer(kind, mine) != _answer(kind, theirs) for kind, mine, theirs in pairs)
    return Agreement(len(pairs), different, max(gaps, default=None))


def _below(name: str, results: Results) -> Iterator[str]:
    for part in results["group_subtasks"].get(name, ()):
        yield part
        yield from _below(part, results)


def _pairs(task: str, ours: Results, reference: Results) -> Iterator[tuple[str, Any, Any]]:
    """Kind of task and both samples of each document, as the first filter left them."""
    kind = ours["configs"][task]["output_type"]
    theirs = {(sample["doc_id"], sample["filter"]): sample for sample in reference["samples"][task]}
    first = next((sample["filter"] for sample in ours["samples"][task]), None)
    for sample in ours["samples"][task]:
        if sample["filter"] == first:
            yield kind, sample, theirs[sample["doc_id"], first]


def _answer(kind: str, sample: Mapping[str, Any]) -> object:
    """The choice that is most likely, whether greedy decoding says the text, or the text that was found."""
    answers = sample["filtered_resps"]
    if kind == "multiple_choice":
        return max(range(len(answers)), key=lambda index: answers[index][0])
    return [answer[1] for answer in answers] if kind == "loglikelihood" else answers


def _logprobs(kind: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[tuple[float, float]]:
    if kind in ("multiple_choice", "loglikelihood"):
        for one, other in zip(mine["filtered_resps"], theirs["filtered_resps"], strict=True):
            yield one[0], other[0]
