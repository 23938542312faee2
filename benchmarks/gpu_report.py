"""What `gpu_check` found: one row a bundle and backend, as a table and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.cuda import Gpu
from runtime.tensorrt_api import FLAVORS

ASSUMPTION = "lower-right causality counts from key_value_lengths"
TOLERANCE = {"fp32": 1e-3, "fp16": 0.1, "bf16": 0.5}  # of logits that two kernels of one precision compute


@dataclass
class Result:
    """One bundle on one backend; seconds and GB/s are of 10⁹ bytes."""

    bundle: str
    precision: str
    backend: str
    version: str = ""
    causality_error: float | None = None
    golden: list[dict[str, Any]] = field(default_factory=list)
    greedy_equal: str = "not compared"
    uncaptured_equal: str = ""
    prefill_ms: float | None = None
    decode_ms: float | None = None
    roofline_ms: float | None = None
    failure: str = ""
    activations: str = ""

    @property
    def tolerance(self) -> float:
        """Of logits."""
        return TOLERANCE[self.activations or self.precision]

    @property
    def passed(self) -> bool:
        """Something was compared, and nothing differs; in 16 bit greedy tokens may, but not by capturing steps."""
        if self.failure or self.causality_error is None or self.causality_error > self.tolerance:
            return False
        captured, _, wanted = self.uncaptured_equal.partition("/")
        if captured != wanted:
            return False
        equal, _, all_of_them = self.greedy_equal.partition("/")
        greedy = self.precision != "fp32" or not all_of_them or equal == all_of_them
        return greedy and all(row["passed"] for row in self.golden)


def report(gpu: Gpu, bandwidth: float, results: Sequence[Result], directory: Path) -> None:
    """One table on stdout, and the same as JSON."""
    print(f"{gpu.device}, copies at {bandwidth / 1e9:.0f} GB/s")
    heads = (
        "bundle",
        "backend",
        "3 into 8",
        "golden",
        "greedy",
        "as uncaptured",
        "prefill ms",
        "decode ms",
        "roofline ms",
        "",
    )
    rows = [heads, *(_row(result) for result in results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for verdict in (
        verdicts := {f"{r.backend} {r.precision}": _verdict(r) for r in results if r.backend in FLAVORS}
    ).values():
        print(verdict)
    written = {
        "schema": 1,
        "device": gpu.device,
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "assumption": ASSUMPTION,
        "verdicts": verdicts,
        "results": [asdict(result) | {"passed": result.passed} for result in results],
    }
    directory.mkdir(parents=True, exist_ok=True)
    name = "-".join(gpu.name.lower().split())
    path = directory / f"gpu-{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print(path)


def _verdict(result: Result) -> str:
    if result.causality_error is None:
        return f"{result.backend} {result.precision}: not settled ({result.failure}): {ASSUMPTION}"
    holds = result.causality_error <= result.tolerance
    found = "holds" if holds else "DOES NOT HOLD, build with --causality mask"
    return f"{result.backend} {result.version} {result.precision}: {found}: {ASSUMPTION}"


def _row(result: Result) -> tuple[str, ...]:
    def number(value: float | None, form: str = ".3f") -> str:
        return "-" if value is None else format(value, form)

    right = sum(row["passed"] for row in result.golden)
    return (
        result.bundle,
        f"{result.backend} {result.version}".strip(),
        number(result.causality_error, ".2g"),
        f"{right}/{len(result.golden)}" if result.golden else "none",
        result.greedy_equal,
        result.uncaptured_equal or "-",
        number(result.prefill_ms),
        number(result.decode_ms),
        number(result.roofline_ms),
        result.failure or ("ok" if result.passed else "WRONG"),
    )
