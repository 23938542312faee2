"""What every pass has in common: it is idempotent, counts what it changed, and states what must hold afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from exporter.parameters import LAYERS
from runtime.contract import past_names
from runtime.errors import UserError


class PassFailed(UserError):
    """A pass did not find the graph it expects. The message says which pass, what it found and what it expected."""


@dataclass(frozen=True)
class PassReport:
    """What a pass did: `count` things changed (fused, folded, removed)."""

    name: str
    count: int


class GraphPass(ABC):
    """A pass over the graph. A second run changes nothing, and `ensures` holds after every run."""

    name: ClassVar[str]

    def __call__(self, model: ir.Model) -> PassReport:
        """Run the pass in place and check its postcondition."""
        report = PassReport(self.name, self.apply(model))
        self.ensures(model)
        return report

    @abstractmethod
    def apply(self, model: ir.Model) -> int:
        """Change the model in place; return the number of changes, 0 where there was nothing to do."""

    def ensures(self, model: ir.Model) -> None:  # noqa: B027 - most passes promise nothing that can be counted
        """Raise PassFailed where the model is not what the pass promises."""

    def fail(self, problem: str) -> PassFailed:
        """An error that names the pass."""
        return PassFailed(
            f"pass {self.name}: {problem}; the traced graph is not one this exporter knows, so nothing was exported "
            "(install the package versions of constraints.txt)"
        )


class LayerPass(GraphPass):
    """A pass ahead of the stack, over the graph of one layer: what it makes can be counted in a graph of any depth."""

    @abstractmethod
    def made(self, model: ir.Model) -> int:
        """How many of the things that the pass makes are in the graph."""


def constant_of(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds; None for anything else."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return tensor.numpy().item() if tensor is not None and tensor.size == 1 else None


def layers_of(graph: ir.Graph) -> int:
    """How many decoder layers have weights in the graph."""
    names = (name.removeprefix(LAYERS) for name in graph.initializers if name.startswith(LAYERS))
    return len({name.partition(".")[0] for name in names})


def has_cache(graph: ir.Graph) -> bool:
    """Whether keys and values of earlier steps go in."""
    return any(value.name == past_names(0)[0] for value in graph.inputs)
