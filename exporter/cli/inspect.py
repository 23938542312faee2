"""`inspect`: what a bundle or a checkpoint is, without loading it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli._console import (
    describe_calibration,
    emit_json,
    note,
    print_comparisons,
    print_facts,
    print_table,
    size,
)
from exporter.cli._options import PATH, json_option, takes_file

if TYPE_CHECKING:
    from exporter.inspection.graph import GraphFacts
    from runtime.bundle import Bundle
    from runtime.manifest import Engine, Manifest


@click.command()
@click.argument("path", type=PATH)
@click.option(
    "--graph", "picture", type=PATH, metavar="FILE.svg", help="Draw one decoder layer of a bundle, as its graph has it."
)
@json_option
def inspect(path: Path, picture: Path | None, as_json: bool) -> None:
    """Show what PATH is, a bundle or a checkpoint.

    Of a bundle: architecture, operators of each layer, precision, size by component, parity, engines; of a
    checkpoint: architecture and size. Reads no weights and needs no torch.

    \b
    nemotron-export inspect ./bundle
    nemotron-export inspect ./bundle --graph layer.svg
    nemotron-export inspect ./Nemotron-Mini-4B-Instruct --json
    """
    from exporter.cli._bundle_facts import describe_bundle
    from exporter.inspection.graph import NEEDS_ONNX, read_graph
    from runtime.bundle import Bundle
    from runtime.errors import UserError
    from runtime.manifest import CONFIG, MANIFEST

    if (path / CONFIG).is_file() and not (path / MANIFEST).is_file():
        if picture is not None:
            raise UserError(
                f"--graph draws what is in a bundle, and {path} is a checkpoint; "
                f"nemotron-export export {path} BUNDLE writes one"
            )
        _inspect_checkpoint(path, as_json)
        return
    bundle = Bundle.open(path)
    graph = read_graph(bundle, complete=picture is not None)
    if picture is not None:
        _draw(bundle, graph, picture)
    facts = describe_bundle(bundle, graph)
    if as_json:
        emit_json(facts)
    else:
        _print_bundle(bundle, facts)
    if graph is None:
        note(f"layers, precision and sizes by component are left out: {NEEDS_ONNX}")


def _draw(bundle: Bundle, graph: GraphFacts | None, picture: Path) -> None:
    from exporter.inspection.drawing import draw_layer
    from exporter.inspection.graph import NEEDS_ONNX
    from runtime.errors import UserError

    if graph is None:
        raise UserError(NEEDS_ONNX)
    if picture.suffix.lower() != ".svg":
        raise UserError(f"cannot draw to {picture}; give a file that ends in .svg")
    if not takes_file(picture):
        raise UserError(f"cannot draw to {picture}; give a file in a directory that is there")
    drawing = draw_layer(graph, bundle.path)
    picture.write_text(drawing, encoding="utf-8")
    note(f"drawn to {picture}")


def _inspect_checkpoint(path: Path, as_json: bool) -> None:
    from exporter.cli._checkpoint_facts import describe_checkpoint

    facts = describe_checkpoint(path)
    if as_json:
        emit_json(facts)
    else:
        _print_checkpoint(facts)
    if facts["model_type"] != "nemotron":
        note(f"model_type is {facts['model_type']!r}; only 'nemotron' can be exported")


def _print_bundle(bundle: Bundle, facts: dict[str, Any]) -> None:
    manifest, parity = bundle.manifest, bundle.manifest.parity
    lowering = manifest.lowering
    print_facts(
        [
            ("bundle", f"{bundle.path} ({size(facts['bytes'])})"),
            ("source", f"{manifest.source.name} ({manifest.source.fingerprint[:12]})"),
            ("adapter", manifest.source.adapter),
            ("made", f"{manifest.created} by {manifest.tool}"),
            ("architecture", _architecture_line(facts["architecture"])),
            ("task", manifest.task),
            ("target", f"{manifest.target}, {manifest.precision}, opset {manifest.opset}"),
            ("max length", f"{manifest.max_length} tokens"),
            ("cache", _cache_line(bundle)),
            ("calibration", describe_calibration(manifest.calibration)),
            ("passes", ", ".join(f"{record.name} ×{record.count}" for record in manifest.passes)),
            ("attention", lowering and ", ".join((lowering.attention, *lowering.fallbacks))),
            ("engines", "none" if not manifest.engines else str(len(manifest.engines))),
            ("golden", _golden_line(facts["golden"])),
            ("quality", _quality_line(manifest)),
            ("parity", _parity_line(bundle)),
        ]
    )
    if parity:
        print_comparisons(parity.comparisons)
    if facts["layers"] is not None:
        _print_graph(facts)
    if manifest.engines:
        _heading("engines")
        print_table([_engine_row(engine) for engine in manifest.engines])
    _heading("files")
    print_table([(name, size(record.bytes)) for name, record in manifest.files.items()])


def _print_graph(facts: dict[str, Any]) -> None:
    _heading("layers")
    _print_layers(facts["layers"])
    _heading("precision")
    print_table(_precision_rows(facts["precision"]))
    _print_components(facts["components"])


def _print_layers(runs: list[dict[str, Any]]) -> None:
    """What layers are made of; of later ones only what they have beyond the first, where that is all."""
    names = [f"{run['first']}–{run['last']}" if run["last"] > run["first"] else str(run["first"]) for run in runs]
    told: list[list[str]] = []
    for run in runs:
        explained = set(re.findall(r"\w+", " ".join(run["fused"])))
        others = [(op, count) for op, count in run["ops"].items() if op.rpartition("::")[2] not in explained]
        told.append([*run["fused"], ", ".join(op + (f" ×{count}" if count > 1 else "") for op, count in others)])
    rows = []
    for name, lines in zip(names, told, strict=True):
        more = [line for line in lines if line not in told[0]]
        alike = lines is not told[0] and len(more) + len(told[0]) == len(lines)
        shown = [f"as {names[0]}, and {', '.join(more)}"] if alike else lines
        rows += [(name if at == 0 else "", line) for at, line in enumerate(shown) if line]
    print_table(rows or [("none", "")])


def _precision_rows(groups: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One row for neighbouring groups of a component that are stored alike."""
    rows: list[tuple[str, ...]] = []
    for (component, words), alike in groupby(groups, key=lambda group: (group["component"], _format_words(group))):
        members = list(alike)
        names = ", ".join(group["group"] for group in members)
        rows.append((component, names, words, f"×{sum(group['tensors'] for group in members)}"))
    return rows


def _format_words(group: dict[str, Any]) -> str:
    from exporter.inspection.tensors import Format

    return Format(group["dtype"], group["block"], group["scales"], group["zero_points"]).words


def _print_components(components: Mapping[str, int]) -> None:
    _heading("size by component")
    total = max(1, sum(components.values()))
    shown = [(name, size(count), f"{100 * count / total:.1f} %") for name, count in components.items() if count]
    print_table(shown or [("none", size(0), "")])


def _heading(title: str) -> None:
    click.echo(click.style(title, bold=True))


def _architecture_line(facts: Mapping[str, Any]) -> str:
    """In one line; numbers that the configuration leaves to transformers are left out."""
    told = [
        (name, words)
        for name, words in (
            ("class", "{}"), ("layers", "{} layers"), ("hidden", "hidden {}"), ("intermediate", "MLP {}"),
            ("activation", "{}"), ("heads", "{} heads"), ("kv_heads", "{} key/value heads"),
            ("head_dim", "head_dim {}"), ("rotary_factor", "rotary {}"), ("rope_type", "rope {}"),
            ("vocabulary", "{} tokens"),
        )
        if name in facts
    ]  # fmt: skip
    return ", ".join(words.format(facts[name]) for name, words in told) + (
        ", tied embeddings" if facts.get("tied_embeddings") else ""
    )


def _engine_row(engine: Engine) -> tuple[str, ...]:
    return (
        engine.path,
        f"{engine.flavor} {engine.version}",
        f"compute capability {', '.join(engine.capabilities)}",
        f"batch {engine.max_batch_size}, input {engine.max_input_len}, capacity {engine.max_seq_len}",
        ", ".join([*(["attention plugin"] if engine.attention == "plugin" else []), *engine.flags]),
    )


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


def _quality_line(manifest: Manifest) -> str | None:
    if (quality := manifest.quality) is None:
        return None
    return (
        f"perplexity {quality.perplexity:.4f} ({quality.perplexity_increase:+.2f} %), KL mean {quality.kl_mean:.2e}, "
        f"same token {100 * quality.top1:.1f} %, on {quality.tokens} tokens of {quality.text}"
    )


def _parity_line(bundle: Bundle) -> str:
    parity = bundle.manifest.parity
    if parity is None:
        return "not checked (exported with --no-verify)"
    return f"{'passed' if parity.passed else 'FAILED'} on {parity.evaluated_by}"


def _print_checkpoint(facts: dict[str, Any]) -> None:
    cache = facts["cache_bytes_per_token"] or {}
    print_facts(
        [
            ("checkpoint", f"{facts['path']} ({size(facts['bytes'])})"),
            ("model type", facts["model_type"]),
            *((name.replace("_", " "), value) for name, value in facts["architecture"].items()),
            ("parameters", _parameters(facts["parameters"])),
            ("tensors", facts["tensors"] and f"{facts['tensors']} in {len(facts['files'])} files"),
            ("dtype", ", ".join(f"{name} ({count})" for name, count in facts["dtypes"].items())),
            ("cache per token", ", ".join(f"{size(count)} ({precision})" for precision, count in cache.items())),
        ]
    )
    if facts["components"]:
        _print_components(facts["components"])
    _heading("files")
    print_table([(name, size(count)) for name, count in facts["files"].items()])


def _parameters(count: int | None) -> str:
    if count is None:
        return "not read: the weights are pickles, which are read with torch alone"
    return f"{count:,}".replace(",", " ")
