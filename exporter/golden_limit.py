"""How far golden cases of rounded weights or a rounded cache may be off on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from exporter.reference import Reference, Row
from exporter.yardstick import Expected, compare
from runtime.bundle import Bundle
from runtime.golden import Golden, replay
from runtime.measured import NO_LIMIT, Comparison
from runtime.ort_session import OrtSession

EIGHT_BIT_FACTOR = 2.0  # of what activations in 8 bits cost here: what they may cost elsewhere


def rounds_activations(bundle: Bundle) -> bool:
    """Whether ONNX Runtime's products with the bundle's weights round activations to 8 bits."""
    manifest = bundle.manifest
    return manifest.quantization is not None and manifest.target == "onnxruntime" and manifest.activations != "bf16"


def kernels_error(bundle: Bundle, golden: Golden) -> float:
    """How far ONNX Runtime's products take the golden cases' logits from what they should be."""
    counted = replay(OrtSession(bundle, slots=1, capacity=1), replace(golden, limit=NO_LIMIT))
    return float(np.max([np.nan if found.value is None else found.value for found in counted]))


def with_kernels_error(golden: Golden, most: float) -> tuple[Golden, Comparison]:
    """Golden cases whose limit allows for products that round activations to 8 bits.

    What they were off by here is recorded; twice that passes elsewhere, where other instructions round otherwise.
    """
    measured = compare("logits", "8-bit products", "max_abs", most, NO_LIMIT)
    return replace(golden, limit=max(golden.limit, EIGHT_BIT_FACTOR * most)), measured


def ties_error(reference: Reference, rows: Sequence[Row], expected: Sequence[Expected]) -> float:
    """What transformers' logits change by where all near ties of a rounded cache go the other way.

    Args:
        reference: what runs the rows, on the cache's grid.
        rows: of the golden cases.
        expected: what it gave.
    """
    turned = reference.forwards([replace(row, kept=[], ties_turned=True) for row in rows])
    pairs = zip(turned, expected, strict=True)
    return max(float(np.abs(other.logits - own.exact.logits).max()) for other, own in pairs)


def with_ties_turned(golden: Golden, most: float) -> tuple[Golden, Comparison]:
    """Golden cases whose limit allows for near ties of a rounded cache, which another machine may round the other way.

    What `ties_error` found is recorded, and passes: a machine turns a few.
    """
    measured = compare("logits", "near ties turned", "max_abs", most, NO_LIMIT)
    return replace(golden, limit=max(golden.limit, most)), measured
