"""The spine: checkpoint → trace → passes → lowering → weights → parity gate → bundle."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter import __version__, passes
from exporter.checkpoint import Checkpoint
from exporter.companions import check_companions, write_companions, write_genai_config
from exporter.lowering import TARGETS, Target, lower
from exporter.passes.base import PassReport
from exporter.staging import check_destination, staged
from exporter.trace import rope_tables, trace
from exporter.verify import NON_FINITE, run_gate, session_of
from exporter.weights import check_tensors, expected_shapes, weight_bytes, write_weights
from runtime.bundle import Bundle, describe_files
from runtime.errors import CheckFailed, UserError
from runtime.manifest import GOLDEN, MODEL, Graph, Lowering, Manifest, PassRecord, Source, TensorSpec
from runtime.ort_session import import_onnxruntime

Progress = Callable[[str, int, int], None]
TASKS = {"text-generation": "NemotronForCausalLM"}


@dataclass(frozen=True)
class ExportOptions:
    """What to export; defaults as on the command line.

    Attributes:
        task: by default the one that the checkpoint's architecture implies.
        target: one of `exporter.lowering.TARGETS`.
        precision: one that the target has.
        max_length: tokens that a row may hold (default and maximum: `max_position_embeddings`).
        verify: run the parity gate; without it the bundle has no golden cases.
        force: replace a bundle that exists.
    """

    task: str | None = None
    target: str = "onnxruntime"
    precision: str = "fp32"
    max_length: int | None = None
    verify: bool = True
    force: bool = False


@dataclass(frozen=True)
class ExportResult:
    """The finished bundle, seconds by stage, and the peak resident memory of the process in MB (10⁶ bytes)."""

    bundle: Path
    seconds: dict[str, float]
    peak_rss_mb: float
    manifest: Manifest

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the command `export`."""
        return {
            "schema": 1,
            "bundle": str(self.bundle),
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.seconds.items()},
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            "manifest": self.manifest.to_json(),
        }


def export(
    checkpoint_path: Path,
    bundle_path: Path | None,
    options: ExportOptions,
    progress: Progress = lambda *_: None,
) -> ExportResult:
    """Export a Hugging Face checkpoint directory to a bundle.

    Args:
        checkpoint_path: the checkpoint's directory.
        bundle_path: where the bundle goes (default: `artifacts/<checkpoint>-<target>-<precision>`).
        options: what to export.
        progress: called with a stage ("trace", "passes", "weights", "verify"), what is done of it and how much
            there is (bytes for the weights).

    Raises:
        UserError: something in the checkpoint, the options or the destination must change.
        CheckFailed: the export differs from transformers; no bundle is left.
    """
    checkpoint = Checkpoint.open(checkpoint_path)
    destination = bundle_path or Path("artifacts") / f"{checkpoint.name}-{options.target}-{options.precision}"
    _check_place(destination, checkpoint, options.force)
    options = _resolved(options, checkpoint)
    assert options.max_length is not None
    check_companions(checkpoint)
    check_tensors(expected_shapes(checkpoint.spec), checkpoint)
    clock = _Clock(progress)

    with staged(destination, options.force) as directory:
        with clock.stage("trace"):
            model = trace(checkpoint.spec)
        with clock.stage("passes"):
            tables = rope_tables(checkpoint.spec, options.max_length)
            reports = passes.run(passes.pipeline(checkpoint.spec, *tables, options.precision), model)
            target = lower(model, options.target, checkpoint.spec.layers)
        with clock.stage("weights"):
            total = weight_bytes(model)
            data = directory / f"{MODEL}.data"
            write_weights(model, checkpoint, data, lambda done: progress("weights", min(done, total), total))
            ir.save(model, directory / MODEL)
            write_companions(checkpoint, directory)
            if options.target == "onnxruntime":
                write_genai_config(checkpoint, directory, options.max_length)
            manifest = _manifest(directory, checkpoint, options, model, target, reports)
            manifest.save(directory)
        if options.verify:
            with clock.stage("verify"):
                manifest = _gate(directory, checkpoint, manifest, progress)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return ExportResult(destination, clock.seconds, peak, manifest)


def _check_place(destination: Path, checkpoint: Checkpoint, force: bool) -> None:
    check_destination(destination, force)
    if checkpoint.path.resolve().is_relative_to(destination.resolve()):
        raise UserError(
            f"the checkpoint {checkpoint.path} lies in {destination}, which --force would delete; "
            "choose another place for the bundle"
        )


def _resolved(options: ExportOptions, checkpoint: Checkpoint) -> ExportOptions:
    """Options with the checkpoint's defaults filled in and every value checked."""
    implied = next((task for task, cls in TASKS.items() if cls == checkpoint.spec.architecture), None)
    task = options.task or implied
    if task is None:
        raise UserError(
            f"{checkpoint.path}: architecture {checkpoint.spec.architecture} cannot be exported; "
            f"known: {', '.join(TASKS.values())}"
        )
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if options.target not in TARGETS:
        raise UserError(f"unknown target {options.target!r}; known: {', '.join(TARGETS)}")
    precisions = TARGETS[options.target].precisions
    if options.precision not in precisions:
        raise UserError(
            f"unknown precision {options.precision!r} for target {options.target}; known: {', '.join(precisions)}"
        )
    limit = checkpoint.spec.max_positions
    max_length = limit if options.max_length is None else options.max_length
    if not 1 <= max_length <= limit:
        raise UserError(
            f"--max-length should be within 1..{limit}, the model's max_position_embeddings; found {max_length}"
        )
    if options.verify and options.precision == "fp32":
        import_onnxruntime()  # the gate runs the graph: better to know now
    return replace(options, task=task, max_length=max_length)


def _manifest(
    directory: Path,
    checkpoint: Checkpoint,
    options: ExportOptions,
    model: ir.Model,
    target: Target,
    reports: list[PassReport],
) -> Manifest:
    """The manifest of what has been written so far; parity is not known yet."""
    assert options.task is not None
    assert options.max_length is not None
    return Manifest(
        tool=f"nemotron-export {__version__}",
        created=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        source=Source(name=checkpoint.name, fingerprint=checkpoint.fingerprint()),
        task=options.task,
        target=options.target,
        precision=options.precision,
        opset=target.opset,
        max_length=options.max_length,
        graph=_describe_graph(model),
        passes=tuple(PassRecord(name=report.name, count=report.count) for report in reports),
        lowering=Lowering(attention=target.attention),
        files=describe_files(directory),
    )


def _gate(directory: Path, checkpoint: Checkpoint, manifest: Manifest, progress: Progress) -> Manifest:
    """Run the parity gate and store its verdict and golden cases; fail closed."""
    bundle = Bundle.open(directory)
    result = run_gate(bundle, checkpoint, session_of(bundle), progress)
    failed = [comparison for comparison in result.parity.comparisons if not comparison.passed]
    if failed:
        worst = failed[0]
        if worst.metric == NON_FINITE:
            raise CheckFailed(
                f"{worst.name} is not finite in {manifest.precision}, the first of {worst.value:.0f} such tensors; "
                "no bundle was written; export with --precision bf16, which has the range of fp32, or fp32"
            )
        raise CheckFailed(
            f"the export is not the checkpoint's model: {len(failed)} of {len(result.parity.comparisons)} comparisons "
            f"failed, {worst.name} of {worst.case} first ({worst.metric} {worst.value}, limit {worst.limit:.1e}); "
            "no bundle was written"
        )
    assert result.golden is not None
    result.golden.save(directory / GOLDEN)
    manifest = replace(manifest, parity=result.parity, files=describe_files(directory))
    manifest.save(directory)
    return manifest


def _describe_graph(model: ir.Model) -> Graph:
    def describe(value: ir.Value) -> TensorSpec:
        assert value.name is not None
        assert value.dtype is not None
        assert value.shape is not None
        shape = tuple(dim if isinstance(dim, int) else str(dim.value) for dim in value.shape)
        return TensorSpec(name=value.name, dtype=value.dtype.numpy().name, shape=shape)

    return Graph(inputs=tuple(map(describe, model.graph.inputs)), outputs=tuple(map(describe, model.graph.outputs)))


class _Clock:
    """Seconds by stage; tells the progress callback when a stage begins and ends."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body."""
        self._progress(name, 0, 1)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self._progress(name, 1, 1)
