"""Benchmarks that were published of a model, as sets of lm-eval's tasks that one name asks for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One number.

    Attributes:
        task: lm-eval's name; `xlsum_en` is a name for what lm-eval does not have.
        shots: examples before each question.
        metric, answers: lm-eval's name of the metric, and of the filter that finds the answer in a text.
        value: as lm-eval gives it, a part of 1.
        remark: where what is measured here is not the same.
    """

    task: str
    shots: int
    metric: str
    answers: str
    value: float
    remark: str = ""


# Of Minitron-4B-Base: values as in its model card, shots as in table 1 of https://arxiv.org/abs/2408.11796, which has
# the same values. The card calls all but MMLU zero-shot.
SETS = {
    "minitron-4b": (
        Published("mmlu", 5, "acc", "none", 0.586),
        Published("hellaswag", 10, "acc_norm", "none", 0.750),
        Published("winogrande", 5, "acc", "none", 0.740),
        Published("gsm8k", 5, "exact_match", "strict-match", 0.241),
        Published("arc_challenge", 25, "acc_norm", "none", 0.509),
        Published("xlsum_en", 3, "rougeL", "none", 0.295),
        Published(
            "humaneval", 0, "pass@1", "create_test", 0.233, "published of 20 drawn texts each, here of one greedy"
        ),
    ),
}
