"""A bundle's graph becomes a TensorRT engine beside it. Imports no torch: it runs on the deployment machine."""

from __future__ import annotations

import hashlib
import logging
import re
import resource
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exporter.builder import configure, monitor_of
from exporter.engine_options import PLUGIN, BuildOptions, Shapes, check_options, resolve_capabilities, resolve_shapes
from exporter.network import ParsedNetwork, parse
from exporter.plugin_attention import change_of
from plugins.tensorrt_network import (
    CAUSALITIES,
    LENGTHS_ASSUMPTION,
    LOWER_RIGHT,
    PLUGIN_ASSUMPTIONS,
    SOFTMAX_ASSUMPTION,
)
from runtime.bundle import Bundle, sha256_of
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden
from runtime.manifest import ENGINES, GOLDEN, MODEL, PLAN, Engine, FileRecord, Manifest
from runtime.tensorrt_api import Messages, import_tensorrt

Progress = Callable[[str, int, int], None]
TARGET = "tensorrt"

# What TensorRT warns of and nobody can or need act on.
_HARMLESS = (
    r"Make sure input .* has Int64 binding",  # the session binds int64
)
_debug = logging.getLogger("nemotron_export.tensorrt").debug


@dataclass(frozen=True)
class BuildResult:
    """The engine's record, its native layers by kind, seconds, peak memory in MB (10⁶ bytes), and warnings."""

    bundle: Path
    engine: Engine
    plan_bytes: int
    layers: dict[str, int]
    seconds: float
    peak_rss_mb: float
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the command `build`."""
        return {
            "schema": 1,
            "bundle": str(self.bundle),
            "engine": self.engine.to_json(),
            "plan_bytes": self.plan_bytes,
            "layers": self.layers,
            "seconds": round(self.seconds, 3),
            "peak_rss_mb": round(self.peak_rss_mb, 1),
            "warnings": list(self.warnings),
        }


def build(path: Path, options: BuildOptions, progress: Progress = lambda *_: None) -> BuildResult:
    """Build an engine of a bundle of target `tensorrt` and record it in the manifest.

    Args:
        path: the bundle's directory; the engine's directory appears in it complete, or not at all.
        options: what to build.
        progress: called with a stage ("check", "parse", "build", "write"), what is done of it and how much there is.

    Raises:
        UserError: the bundle, an option or the installation must change.
        CheckFailed: the graph or its weights are not what the manifest says.
    """
    started = time.perf_counter()
    bundle = Bundle.open(path)
    _check_bundle(bundle, options)
    trt = import_tensorrt(options.flavor)
    needed = Golden.load(bundle.file(GOLDEN)).capacity if bundle.has(GOLDEN) else 1
    shapes = resolve_shapes(options, bundle.manifest.max_length, needed)
    capabilities = resolve_capabilities(trt, options, bundle.manifest.precisions)
    record = _record(bundle, options, shapes, capabilities, str(trt.__version__))
    _check_place(bundle, record, options.force)
    change = change_of(trt, options, capabilities[0], bundle)

    progress("check", 0, 1)
    _check_content(bundle)
    progress("parse", 0, 1)
    parsed = parse(trt, bundle, shapes.capacity, change)
    layers = parsed.mend(options.causality).layers
    plan = _build(parsed, options, shapes, capabilities, progress)
    progress("write", 0, 1)
    with _stored(bundle, record, plan) as file:
        _save(bundle, record, file)
    progress("write", 1, 1)
    return BuildResult(
        bundle=path,
        engine=record,
        plan_bytes=file.bytes,
        layers=layers,
        seconds=time.perf_counter() - started,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6,
        warnings=_actionable(parsed.messages),
    )


def _check_bundle(bundle: Bundle, options: BuildOptions) -> None:
    manifest = bundle.manifest
    if manifest.target != TARGET:
        raise UserError(
            f"{bundle.path} is of target {manifest.target}, engines are built of target {TARGET}; "
            f"nemotron-export export CHECKPOINT --target {TARGET} writes one"
        )
    if not bundle.has_cache:
        raise UserError(
            f"{bundle.path} runs whole rows ({manifest.task}), and engines are built for text generation with a cache; "
            "run it on ONNX Runtime, or give model.onnx to trtexec"
        )
    check_options(options)
    if options.causality not in CAUSALITIES:
        raise UserError(f"unknown causality {options.causality!r}; known: {', '.join(CAUSALITIES)}")


def _check_place(bundle: Bundle, record: Engine, force: bool) -> None:
    if not force and any(engine.path == record.path for engine in bundle.manifest.engines):
        raise UserError(f"{bundle.path / record.path} exists; replace it with --force")


def _check_content(bundle: Bundle) -> None:
    """Compare the graph and its weights with the manifest: an engine of other bytes would be another model."""
    for name in (MODEL, f"{MODEL}.data"):
        if bundle.has(name) and sha256_of(bundle.path / name) != bundle.manifest.files[name].sha256:
            raise CheckFailed(
                f"{bundle.path / name} differs from the manifest's sha256; copy or export the bundle again"
            )


def _record(
    bundle: Bundle, options: BuildOptions, shapes: Shapes, capabilities: tuple[str, ...], version: str
) -> Engine:
    built_for = "-".join(f"sm{capability.replace('.', '')}" for capability in capabilities)
    return Engine(
        path=f"{ENGINES}/{options.flavor}-{version}-{built_for}/{PLAN}",
        flavor=options.flavor,
        version=version,
        capabilities=capabilities,
        max_batch_size=shapes.batch,
        max_input_len=shapes.input_len,
        max_seq_len=shapes.capacity,
        max_kept=shapes.kept,
        precision=bundle.manifest.precision,
        causality=options.causality,
        attention=options.attention,
        graph_sha256=bundle.manifest.files[MODEL].sha256,
        flags=options.flags,
        assumptions=_assumptions(options, bundle.manifest.activations),
    )


def _build(
    parsed: ParsedNetwork, options: BuildOptions, shapes: Shapes, capabilities: tuple[str, ...], progress: Progress
) -> Any:
    """The serialised engine, as a buffer.

    The engine in memory holds one copy of the weights and its serialisation another. The mapped file would count a
    third time: its pages are given back when the engine is made.
    """
    trt, builder = parsed.trt, parsed.builder
    config = configure(trt, builder, parsed.network, options, shapes, capabilities)
    monitor = monitor_of(trt, lambda done: progress("build", int(1000 * done), 1000), parsed.release_pages)
    config.progress_monitor = monitor
    progress("build", 0, 1000)
    plan = builder.build_serialized_network(parsed.network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    _log(parsed.messages)
    if plan is None:
        raise UserError(
            f"{options.flavor} {trt.__version__} cannot build {parsed.path} for compute capability "
            f"{', '.join(capabilities)}: {parsed.messages.reason()}; try another --precision, "
            f"{'--attention native' if options.attention == PLUGIN else '--causality mask'}, or smaller shapes"
        )
    if options.timing_cache:
        options.timing_cache.write_bytes(config.get_timing_cache().serialize())
    return plan


def _assumptions(options: BuildOptions, activations: str) -> tuple[str, ...]:
    """What an engine relies on that NVIDIA's documentation leaves open."""
    if options.attention == PLUGIN:
        return PLUGIN_ASSUMPTIONS
    lengths = (LENGTHS_ASSUMPTION,) if options.causality == LOWER_RIGHT else ()
    return lengths if activations == "fp32" else (*lengths, SOFTMAX_ASSUMPTION)


@contextmanager
def _stored(bundle: Bundle, record: Engine, plan: Any) -> Iterator[FileRecord]:
    """Write the plan into a directory that is renamed to its place; what was there returns where the body fails."""
    place = (bundle.path / record.path).parent
    staging = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    old = staging.with_suffix(".old")
    content = memoryview(plan)
    try:
        staging.mkdir(parents=True)
        (staging / PLAN).write_bytes(content)
        file = FileRecord(sha256=hashlib.sha256(content).hexdigest(), bytes=content.nbytes)
        if place.exists():
            place.rename(old)
        staging.rename(place)
        yield file
    except BaseException as error:
        if not staging.exists():
            shutil.rmtree(place, ignore_errors=True)
        if old.exists():
            old.rename(place)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {place}: {error.strerror}; free space there, or make it writable") from error
        raise
    finally:
        for leftover in (staging, old):
            shutil.rmtree(leftover, ignore_errors=True)
        with suppress(OSError):  # there is an engine in it
            place.parent.rmdir()


def _save(bundle: Bundle, record: Engine, file: FileRecord) -> None:
    """Record the engine in the manifest as it is now: another build may have finished meanwhile."""
    manifest = Manifest.load(bundle.path)
    others = tuple(engine for engine in manifest.engines if engine.path != record.path)
    files = dict(sorted({**manifest.files, record.path: file}.items()))
    replace(manifest, engines=(*others, record), files=files).save(bundle.path)


def _actionable(messages: Messages) -> tuple[str, ...]:
    """Warnings that a user can do something about, each once, in one line."""
    warnings = dict.fromkeys(" ".join(warning.split()) for warning in messages.warnings)
    return tuple(warning for warning in warnings if not any(re.search(pattern, warning) for pattern in _HARMLESS))


def _log(messages: Messages) -> None:
    for message in (*messages.details, *messages.warnings, *messages.errors):
        _debug("%s", message)
