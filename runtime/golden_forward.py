"""Golden cases of graphs without a cache: rows and every output, stored by the exporter, replayed where a bundle runs.

A graph for text-generation has cases of the other kind, `runtime.golden.Golden`: whole rows of logits over a large
vocabulary would not fit the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from runtime.contract import LOGITS
from runtime.errors import CheckFailed
from runtime.forward import ForwardSession
from runtime.golden_file import FORWARD, reading
from runtime.measured import Comparison
from runtime.session import Floats, Ints


@dataclass(frozen=True)
class ForwardCase:
    """Rows, and what the graph makes of them.

    Attributes:
        case: what the rows stand for, as in the gate: "right-padded", "left-padded".
        input_ids, attention_mask: int64 [batch, sequence], as `ForwardSession.run` takes them.
        outputs: float32 by the graph's names, each at its full shape; outputs that are not here are not compared.
    """

    case: str
    input_ids: Ints
    attention_mask: Ints
    outputs: Mapping[str, Floats]


@dataclass(frozen=True)
class GoldenForward:
    """Cases to run one by one; the largest difference that passes, of all outputs or of each by its name."""

    limit: float | Mapping[str, float]
    cases: Sequence[ForwardCase]

    def limit_of(self, output: str) -> float:
        """The largest difference that passes in this output."""
        return self.limit[output] if isinstance(self.limit, Mapping) else self.limit

    def save(self, path: Path) -> None:
        """Write the cases as a compressed npz."""
        limits = self.limit if isinstance(self.limit, Mapping) else {"": self.limit}
        arrays: dict[str, NDArray[Any]] = {
            "schema": np.array(1),
            "kind": np.array(FORWARD),
            "cases": np.array([case.case for case in self.cases]),
            "limit_names": np.array(list(limits)),
            "limits": np.array(list(limits.values())),
        }
        for i, case in enumerate(self.cases):
            arrays |= {f"{i}.input_ids": case.input_ids, f"{i}.attention_mask": case.attention_mask}
            arrays |= {f"{i}.outputs.{name}": np.asarray(value, np.float32) for name, value in case.outputs.items()}
        np.savez_compressed(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the cases.

        Raises:
            UserError: the file is damaged, of another schema, or holds steps of a cached graph.
        """
        with reading(path, FORWARD) as arrays:
            names = [str(name) for name in arrays["limit_names"]]
            limits = dict(zip(names, map(float, arrays["limits"]), strict=True))
            cases = [_read_case(arrays, i, str(case)) for i, case in enumerate(arrays["cases"])]
            return cls(limits.get("", limits), cases)


def replay_forward(session: ForwardSession, golden: GoldenForward) -> list[Comparison]:
    """Run the golden cases and compare every recorded output by the largest |Δ|, where tokens are real.

    A number that is not finite at a real position fails.

    Raises:
        CheckFailed: the graph gives no such output, or one of another shape.
    """
    comparisons = []
    for case in golden.cases:
        found = session.run(case.input_ids, case.attention_mask)
        for name, expected in case.outputs.items():
            if name not in found or found[name].shape != expected.shape:
                shape = found[name].shape if name in found else "nothing"
                raise CheckFailed(
                    f"{name} of {case.case!r} should be {expected.shape}, {session.backend} gives {shape}; "
                    "copy or export the bundle again"
                )
            real = real_tokens(name, expected.shape, case.attention_mask.astype(bool))
            difference = float(np.abs(found[name][real] - expected[real]).max())
            value = difference if np.isfinite(difference) else None
            limit = golden.limit_of(name)
            passed = value is not None and value <= limit
            comparisons.append(
                Comparison(name=name, case=case.case, metric="max_abs", value=value, limit=limit, passed=passed)
            )
    return comparisons


def real_tokens(name: str, shape: tuple[int, ...], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where an output speaks of real tokens, as an index of its leading axes.

    Args:
        name, shape: of the output.
        mask: bool [batch, sequence], true for a real token.

    Returns:
        Everything of pooled logits [batch, labels]; query × key of attentions; of others `mask`.
    """
    if name == LOGITS and len(shape) == 2:
        return np.ones(shape, bool)
    if name.startswith("attentions."):
        return np.broadcast_to(mask[:, None, :, None] & mask[:, None, None, :], shape)
    return mask


def _read_case(arrays: Any, index: int, case: str) -> ForwardCase:
    prefix = f"{index}.outputs."
    outputs = {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}
    return ForwardCase(case, arrays[f"{index}.input_ids"], arrays[f"{index}.attention_mask"], outputs)
