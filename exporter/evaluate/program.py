"""What both walkers make of a graph: steps in order, each with its inputs, its outputs' dtypes and its arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from runtime.errors import UserError

Compute = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]


class CannotEvaluate(UserError):
    """An operation, attribute or dtype that the evaluation has no meaning for."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"the evaluation knows no {what}; do without it (--no-verify, or verify without --network), "
            "and check the bundle where it runs"
        )


@dataclass(frozen=True)
class Edge:
    """A value between operations, and the dtype that it is rounded to."""

    name: str
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """One operation: `compute` takes one tensor (or None) for each input and gives one for each output, unrounded."""

    name: str
    inputs: tuple[str | None, ...]
    outputs: tuple[Edge, ...]
    compute: Compute


@dataclass(frozen=True)
class Result:
    """What a run gave: the outputs, and the names of edges that were not finite, in the order of the run."""

    outputs: dict[str, torch.Tensor]
    non_finite: list[str]


@dataclass(frozen=True)
class Program:
    """A graph ready to run.

    Attributes:
        inputs: the tensors to feed.
        constants: reads a weight; each is read when a step needs it, and not kept.
        steps: in an order in which they can run.
        outputs: names of the tensors handed out.
        owner: what must live as long as the weights do.
    """

    inputs: tuple[Edge, ...]
    constants: Mapping[str, Callable[[], torch.Tensor]]
    steps: Sequence[Step]
    outputs: tuple[str, ...]
    owner: object = field(default=None, repr=False)

    def run(self, feeds: Mapping[str, torch.Tensor]) -> Result:
        """Run every step.

        Args:
            feeds: a tensor for each input that has no default.

        Raises:
            ValueError: one of another dtype than its input.
        """
        for edge in self.inputs:
            if edge.name in feeds and feeds[edge.name].dtype != edge.dtype:
                raise ValueError(f"{edge.name} is {edge.dtype}, not {feeds[edge.name].dtype}")
        values = dict(feeds)
        left = Counter(self._uses)
        non_finite = []
        with torch.inference_mode():
            for step in self.steps:
                arguments = [None if name is None else self._value(values, name) for name in step.inputs]
                results = step.compute(*arguments)
                if isinstance(results, torch.Tensor):
                    results = (results,)
                for edge, result in zip(step.outputs, results, strict=True):
                    values[edge.name] = rounded = result.to(edge.dtype)
                    if rounded.is_floating_point() and not torch.isfinite(rounded).all():
                        non_finite.append(edge.name)
                for name in step.inputs:
                    if name is not None:
                        left[name] -= 1
                        if not left[name]:
                            values.pop(name, None)
        return Result({name: self._value(values, name) for name in self.outputs}, non_finite)

    def between(self, given: Sequence[str], outputs: Sequence[str]) -> Program:
        """The part that makes these outputs of values that are given, and of the program's own inputs and constants."""
        made = {edge.name: edge for step in self.steps for edge in step.outputs}
        edges = (*self.inputs, *(made[name] for name in given if name in made))
        steps = in_order(self.steps, [*self.constants, *(edge.name for edge in edges)], outputs)
        return replace(self, inputs=edges, steps=steps, outputs=tuple(outputs))

    def _value(self, values: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        return values[name] if name in values else self.constants[name]()

    @cached_property
    def _uses(self) -> Counter[str]:
        """How often each value is read; those handed out once more, so that they stay."""
        return Counter([*(name for step in self.steps for name in step.inputs if name is not None), *self.outputs])


def in_order(steps: Iterable[Step], known: Iterable[str], outputs: Iterable[str]) -> list[Step]:
    """The steps that the outputs need, each after those it reads from; the rest compute nothing that anyone sees.

    Raises:
        CannotEvaluate: a value that nothing computes, or that two steps do.
    """
    makers: dict[str, Step] = {}
    for step in steps:
        for edge in step.outputs:
            if edge.name in makers:
                raise CannotEvaluate(f"way to tell two tensors named {edge.name} apart")
            makers[edge.name] = step
    given = set(known)
    ordered: list[Step] = []
    stack = [(name, False) for name in reversed(list(outputs))]
    done: set[str] = set()
    while stack:
        name, ready = stack.pop()
        if name in given or name in done:
            continue
        if name not in makers:
            raise CannotEvaluate(f"value for {name}, which no operation computes")
        step = makers[name]
        if ready:
            ordered.append(step)
            done.update(edge.name for edge in step.outputs)
            continue
        stack.append((name, True))
        stack.extend((value, False) for value in reversed(step.inputs) if value is not None and value not in done)
    return ordered
