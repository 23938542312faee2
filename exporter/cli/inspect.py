"""`inspect`: what a bundle or a checkpoint is, without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli._checkpoint_facts import describe_checkpoint
from exporter.cli._console import (
    describe_calibration,
    emit_json,
    note,
    print_comparisons,
    print_facts,
    print_table,
    size,
)
from exporter.cli._options import PATH, json_option

if TYPE_CHECKING:
    from runtime.bundle import Bundle


@click.command()
@click.argument("path", type=PATH)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Show what PATH is, a bundle or a checkpoint.

    Of a bundle: source, passes, parity, files; of a checkpoint: architecture and size. Reads no weights and
    needs no torch.

    \b
    nemotron-export inspect ./bundle
    nemotron-export inspect ./Nemotron-Mini-4B-Instruct --json
    """
    from runtime.bundle import Bundle
    from runtime.manifest import CONFIG, MANIFEST

    if (path / CONFIG).is_file() and not (path / MANIFEST).is_file():
        facts = describe_checkpoint(path)
        if as_json:
            emit_json(facts)
        else:
            _print_checkpoint(facts)
        if facts["model_type"] != "nemotron":
            note(f"model_type is {facts['model_type']!r}; only 'nemotron' can be exported")
        return
    bundle = Bundle.open(path)
    facts = describe_bundle(bundle)
    if as_json:
        emit_json(facts)
    else:
        _print_bundle(bundle, facts)


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """The JSON object of the command for a bundle: its manifest, and what follows from it."""
    manifest = bundle.manifest
    return {
        "schema": 1,
        "kind": "bundle",
        "path": str(bundle.path),
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "cache_bytes_per_token": _cache_bytes_per_token(bundle),
        "golden": _golden(bundle),
        "manifest": manifest.to_json(),
    }


def _cache_bytes_per_token(bundle: Bundle) -> int | None:
    """What one more token of one row takes in the cache; None for a graph without one."""
    return bundle.cache_geometry.bytes_per_token if bundle.has_cache else None


def _golden(bundle: Bundle) -> dict[str, Any] | None:
    from runtime.golden import Golden
    from runtime.golden_forward import GoldenForward
    from runtime.manifest import GOLDEN

    if not bundle.has(GOLDEN):
        return None
    if bundle.manifest.task != "text-generation":
        forward = GoldenForward.load(bundle.file(GOLDEN))
        return {"cases": [case.case for case in forward.cases], "limit": forward.limit}
    golden = Golden.load(bundle.file(GOLDEN))
    cases = [step.case for step in golden.steps]
    return {"cases": cases, "slots": golden.slots, "capacity": golden.capacity, "limit": golden.limit}


def _print_bundle(bundle: Bundle, facts: dict[str, Any]) -> None:
    manifest, parity, golden = bundle.manifest, bundle.manifest.parity, facts["golden"]
    lowering = manifest.lowering
    print_facts(
        [
            ("bundle", f"{bundle.path} ({size(facts['bytes'])})"),
            ("source", f"{manifest.source.name} ({manifest.source.fingerprint[:12]})"),
            ("adapter", manifest.source.adapter),
            ("made", f"{manifest.created} by {manifest.tool}"),
            ("task", manifest.task),
            ("target", f"{manifest.target}, {manifest.precision}, opset {manifest.opset}"),
            ("max length", f"{manifest.max_length} tokens"),
            ("cache", _cache_line(bundle)),
            ("calibration", describe_calibration(manifest.calibration)),
            ("passes", ", ".join(f"{record.name} ×{record.count}" for record in manifest.passes)),
            ("attention", lowering and ", ".join((lowering.attention, *lowering.fallbacks))),
            ("engines", ", ".join(engine.path for engine in manifest.engines) or "none"),
            ("golden", _golden_line(golden)),
            ("parity", _parity_line(bundle)),
        ]
    )
    if parity:
        print_comparisons(parity.comparisons)
    click.echo(click.style("files", bold=True))
    print_table([(name, size(record.bytes)) for name, record in manifest.files.items()])


def _cache_line(bundle: Bundle) -> str:
    if not bundle.has_cache:
        return "none"
    cache = bundle.cache_geometry
    row = cache.bytes_per_token * bundle.manifest.max_length
    rounded = bundle.manifest.kv_cache or cache.dtype
    return f"{size(cache.bytes_per_token)} per token, {size(row)} per full row ({rounded})"


def _golden_line(golden: dict[str, Any] | None) -> str:
    if golden is None:
        return "none"
    counts = {case: golden["cases"].count(case) for case in golden["cases"]}
    steps = ", ".join(f"{case} ×{count}" for case, count in counts.items())
    limit = golden["limit"]
    return f"{steps}, limit {max(limit.values()) if isinstance(limit, dict) else limit:.3g}"


def _parity_line(bundle: Bundle) -> str:
    parity = bundle.manifest.parity
    if parity is None:
        return "not checked (exported with --no-verify)"
    return f"{'passed' if parity.passed else 'FAILED'} on {parity.evaluated_by}"


def _print_checkpoint(facts: dict[str, Any]) -> None:
    print_facts(
        [
            ("checkpoint", f"{facts['path']} ({size(facts['bytes'])})"),
            ("model type", facts["model_type"]),
            *((name.replace("_", " "), value) for name, value in facts["architecture"].items()),
            ("parameters", _parameters(facts["parameters"])),
            ("tensors", facts["tensors"] and f"{facts['tensors']} in {len(facts['files'])} files"),
            ("dtype", ", ".join(f"{name} ({count})" for name, count in facts["dtypes"].items())),
        ]
    )
    click.echo(click.style("files", bold=True))
    print_table([(name, size(count)) for name, count in facts["files"].items()])


def _parameters(count: int | None) -> str:
    if count is None:
        return "not read: the weights are pickles, which are read with torch alone"
    return f"{count:,}".replace(",", " ")
