"""The spine: checkpoint → trace → passes → lowering → weights → parity gate → bundle."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from exporter import passes
from exporter.ahead import hashed_ahead
from exporter.calibrate import calibrate
from exporter.calibrated import Calibrated
from exporter.checkpoint import Checkpoint
from exporter.companions import check_companions, write_companions, write_genai_config
from exporter.describe import describe
from exporter.gate_size import fits_whole, refusal
from exporter.lowering import lower
from exporter.parameters import check_tensors, expected_shapes, is_matrix, weight_source
from exporter.plan import ExportOptions, Plan, Windows, make_plan, sample_of, windows_of
from exporter.preflight import check_room
from exporter.quality import check_limits, logits_of, measure
from exporter.quality_layers import measure_layers
from exporter.rope import rope_tables
from exporter.scaling import Scaling
from exporter.staging import check_destination, staged
from exporter.tasks import GENERATION, GraphForm
from exporter.trace import trace
from exporter.verify import NON_FINITE, gate, session_of
from exporter.verify_rows import whole_row_logits
from exporter.weights import weight_bytes, write_embeddings, write_weights
from exporter.yardstick import HIDDEN_STATES
from runtime.bundle import Bundle, describe_files
from runtime.contract import EMBED_TOKENS
from runtime.errors import CheckFailed, UserError
from runtime.manifest import (
    GOLDEN,
    MODEL,
    FileRecord,
    Manifest,
)
from runtime.measured import Quality
from runtime.ort_session import OrtSession

Progress = Callable[[str, int, int], None]

__all__ = ["ExportOptions", "ExportResult", "export"]


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
    checkpoint_path: Path | str,
    bundle_path: Path | None,
    options: ExportOptions,
    progress: Progress = lambda *_: None,
    *,
    room_checked: bool = False,
) -> ExportResult:
    """Export a Hugging Face checkpoint to a bundle.

    Args:
        checkpoint_path: the checkpoint's directory, or its hub id.
        bundle_path: where the bundle goes (default: `artifacts/<checkpoint>-<target>-<precision>`).
        options: what to export.
        progress: called with a stage ("trace", "calibration", "passes", "weights", "verify", "quality"), what is done
            of it and how much there is (bytes for the weights).
        room_checked: `exporter.preflight.check_room` has been called, before torch was loaded.

    Raises:
        UserError: something in the checkpoint, the options or the destination must change.
        CheckFailed: the export differs from transformers; no bundle is left.
    """
    checkpoint = Checkpoint.open(checkpoint_path, options.adapter, revision=options.revision)
    destination = bundle_path or Path("artifacts") / f"{checkpoint.name}-{options.target}-{options.precision}"
    _check_place(destination, checkpoint, options.force)
    plan = make_plan(options, checkpoint)
    if not room_checked:
        check_room(checkpoint.path, destination, options)
    spec, task, form = checkpoint.spec, plan.task, plan.form
    sources = _check_content(checkpoint, plan)
    windows = windows_of(options, plan, checkpoint)
    sample = sample_of(options, plan, checkpoint)
    layered = _goes_by_layers(options, plan, checkpoint)
    clock = _Clock(progress)

    with staged(destination, options.force) as directory:
        with clock.stage("trace"), hashed_ahead(checkpoint, sources):
            model = trace(spec, task, cached=form.cache)
        calibrated = Calibrated(Scaling(spec))
        if sample is not None:
            with clock.stage("calibration"):
                calibrated = calibrate(
                    checkpoint, plan.precision, sample, directory, progress, norm_handed_out=form.hidden_states
                )
        with clock.stage("passes"):
            wanted = passes.Wanted(task.name, form, plan.precision, plan.target, as_stored=plan.link)
            reports = passes.run(passes.pipeline(spec, *rope_tables(spec, plan.max_length), wanted), model)
            lowered = lower(model, options.target, spec.layers, calibrated.cache_scales)
        with clock.stage("weights"):
            hashed = _write_files(directory, checkpoint, plan, calibrated, model, progress)
            manifest = describe(directory, checkpoint, plan, calibrated, model, lowered, reports, hashed)
            manifest.save(directory)
        if options.verify:
            with clock.stage("verify"):
                manifest = _gate(directory, checkpoint, manifest, progress, layered=layered)
        if windows is not None:
            with clock.stage("quality"):
                quality = _measure(directory, checkpoint, windows, progress, layered=layered)
                check_limits(quality, options.max_kl, options.max_perplexity_increase)
                manifest = replace(manifest, quality=quality)
                manifest.save(directory)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return ExportResult(destination, clock.seconds, peak, manifest)


def _check_place(destination: Path, checkpoint: Checkpoint, force: bool) -> None:
    check_destination(destination, force)
    sources = [("checkpoint", checkpoint.path), *([("adapter", checkpoint.adapter.path)] if checkpoint.adapter else [])]
    for what, path in sources:
        if path.resolve().is_relative_to(destination.resolve()):
            raise UserError(
                f"the {what} {path} lies in {destination}, which --force would delete; "
                "choose another place for the bundle"
            )


def _check_content(checkpoint: Checkpoint, plan: Plan) -> list[str]:
    """Check the files that go along and every tensor's place and shape; the tensors that the model is made of."""
    check_companions(checkpoint, plan.task)
    shapes = expected_shapes(checkpoint.spec, plan.task)
    check_tensors(shapes, checkpoint, plan.task)
    plan.precision.check_layers(filter(is_matrix, shapes))
    return [weight_source(name, checkpoint) for name in shapes]


def _goes_by_layers(options: ExportOptions, plan: Plan, checkpoint: Checkpoint) -> bool:
    """Whether the gate holds a layer at a time, because the whole model does not fit the memory."""
    if not options.verify or fits_whole(checkpoint, options.memory):
        return False
    if not plan.form.cache or plan.form.hidden_states or plan.form.position_ids:
        raise refusal(checkpoint, options.memory)
    return True


def _write_files(
    directory: Path, checkpoint: Checkpoint, plan: Plan, calibrated: Calibrated, model: ir.Model, progress: Progress
) -> dict[str, FileRecord]:
    """The graph, its weights, and everything of the checkpoint that goes with them.

    Returns:
        Records of the files that were hashed while they were written.
    """
    total = weight_bytes(model)
    data = directory / f"{MODEL}.data"
    # Constants are written, and not counted.
    hashed = write_weights(
        *(model, checkpoint, data, calibrated, lambda done: progress("weights", min(done, total), total)),
        link=plan.link,
    )
    calibrated.save(directory)
    ir.save(model, directory / MODEL)
    if plan.form.embeds:
        hashed[EMBED_TOKENS] = write_embeddings(checkpoint, directory / EMBED_TOKENS)
    write_companions(checkpoint, directory, plan.task)
    if plan.form == GraphForm() and (plan.task.name, plan.target) == (GENERATION, "onnxruntime"):
        write_genai_config(checkpoint, directory, plan.max_length)
    return hashed


def _gate(
    directory: Path, checkpoint: Checkpoint, manifest: Manifest, progress: Progress, *, layered: bool
) -> Manifest:
    """Run the parity gate and store its verdict and golden cases; fail closed."""
    bundle = Bundle.open(directory)
    result = gate(bundle, checkpoint, progress, layered=layered)
    failed = [comparison for comparison in result.parity.comparisons if not comparison.passed]
    if failed:
        # What is not finite, else the layer at which a difference begins, tells more than what follows from it.
        worst = min(failed, key=lambda found: (found.metric != NON_FINITE, found.name != HIDDEN_STATES))
        if worst.metric == NON_FINITE:
            wider = (
                'give a --recipe with activations = "bf16", which has the range of fp32'
                if manifest.quantization
                else "export with --precision bf16, which has the range of fp32, or fp32"
            )
            raise CheckFailed(
                f"{worst.name} is not finite in {manifest.activations}, the first of {worst.value:.0f} such tensors; "
                f"no bundle was written; {wider}"
            )
        raise CheckFailed(
            f"the export is not the checkpoint's model: {len(failed)} of {len(result.parity.comparisons)} comparisons "
            f"failed, {worst.name} of {worst.case} first ({worst.metric} {worst.value}, limit {worst.limit:.1e}); "
            "no bundle was written"
        )
    assert result.golden is not None
    result.golden.save(directory / GOLDEN)
    manifest = replace(manifest, parity=result.parity, files=describe_files(directory, known=manifest.files))
    manifest.save(directory)
    return manifest


def _measure(
    directory: Path, checkpoint: Checkpoint, windows: Windows, progress: Progress, *, layered: bool
) -> Quality:
    """Measure what the precision costs, on what runs the bundle where that computes as the device does."""
    bundle = Bundle.open(directory)
    manifest, tokens, text = bundle.manifest, windows.tokens, windows.text
    kernels = bool(manifest.quantization) and manifest.target == "onnxruntime" and manifest.activations == "fp32"
    if layered:
        return measure_layers(bundle, checkpoint, tokens, text=text, kernels=kernels, progress=progress)
    if not bundle.has_cache:
        logits = whole_row_logits(bundle)
    else:
        logits = logits_of(OrtSession(bundle, slots=1, capacity=1) if kernels else session_of(bundle))
    return measure(checkpoint, logits, tokens, text=text, progress=progress)


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
