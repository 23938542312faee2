"""The manifest of a bundle whose files have been written."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import onnx_ir as ir

from exporter import __version__
from exporter.calibrated import Calibrated
from exporter.checkpoint import Checkpoint
from exporter.lowering import Lowered
from exporter.origin import part_of
from exporter.passes.base import PassReport
from exporter.plan import Plan
from exporter.recipe import Precision
from exporter.rounding import VALUES
from runtime.bundle import describe_files
from runtime.manifest import FileRecord, Graph, Lowering, Manifest, PassRecord, Quantization, Source, TensorSpec

# Operators that read rows of a table, those of the tokens or positions that they are given.
_BY_ROWS = frozenset({"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding"})


def describe(
    directory: Path,
    checkpoint: Checkpoint,
    plan: Plan,
    calibrated: Calibrated,
    model: ir.Model,
    lowered: Lowered,
    reports: list[PassReport],
    hashed: dict[str, FileRecord],
) -> Manifest:
    """The manifest of what has been written so far; parity is not known yet."""
    return Manifest(
        tool=f"nemotron-export {__version__}",
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        source=Source(
            name=checkpoint.name,
            fingerprint=checkpoint.fingerprint(),
            adapter=checkpoint.adapter.name if checkpoint.adapter else None,
        ),
        task=plan.task.name,
        target=plan.target,
        precision=plan.precision.name,
        quantization=_quantization(plan.precision, model),
        kv_cache=plan.precision.kv_cache,
        calibration=calibrated.record,
        opset=lowered.opset,
        max_length=plan.max_length,
        graph=_describe_graph(model),
        step_bytes=_step_bytes(model),
        passes=tuple(PassRecord(name=report.name, count=report.count) for report in reports),
        lowering=Lowering(attention=lowered.attention, fallbacks=lowered.fallbacks),
        files=describe_files(directory, known=hashed),
    )


def _quantization(precision: Precision, model: ir.Model) -> Quantization | None:
    if not precision.quantized:
        return None
    parts = [part_of(value) for value in model.graph.initializers.values()]
    matrices = Counter(part.rounding.precision for part in parts if part is not None and part.name == VALUES)
    return Quantization(recipe=precision.recipe.name, activations=precision.activations, matrices=dict(matrices))


def _step_bytes(model: ir.Model) -> int:
    """Bytes of the initializers that a step reads whole."""
    return sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and any(node.op_type not in _BY_ROWS for node in value.consumers())
    )


def _describe_graph(model: ir.Model) -> Graph:
    def describe(value: ir.Value) -> TensorSpec:
        assert value.name is not None
        assert value.dtype is not None
        assert value.shape is not None
        shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)

    return Graph(inputs=tuple(map(describe, model.graph.inputs)), outputs=tuple(map(describe, model.graph.outputs)))
