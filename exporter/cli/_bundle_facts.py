"""What a bundle's manifest, configuration and graph say, without its weights: the facts that `inspect` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from exporter.cli._checkpoint_facts import architecture_of
from runtime.bundle import Bundle
from runtime.manifest import CONFIG, GOLDEN

if TYPE_CHECKING:
    from exporter.inspection.graph import GraphFacts


def describe_bundle(bundle: Bundle, graph: GraphFacts | None) -> dict[str, Any]:
    """The JSON object of `inspect` for a bundle: its manifest, and what follows from it and from its graph.

    Args:
        bundle: an opened one.
        graph: its graph; None where it cannot be read here, which leaves "layers", "precision" and "components" None.
    """
    manifest = bundle.manifest
    return {
        "schema": 1,
        "kind": "bundle",
        "path": str(bundle.path),
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "architecture": architecture_of(bundle.config) if bundle.has(CONFIG) else {},
        "cache_bytes_per_token": bundle.cache_geometry.bytes_per_token if bundle.has_cache else None,
        **_of_graph(bundle, graph),
        "golden": _golden(bundle),
        "manifest": manifest.to_json(),
    }


def _of_graph(bundle: Bundle, graph: GraphFacts | None) -> dict[str, Any]:
    if graph is None:
        return dict.fromkeys(("layers", "precision", "components"))
    from exporter.inspection.layers import layer_runs, nodes_by_layer
    from exporter.inspection.tensors import component_bytes, tensor_groups

    files = {name: record.bytes for name, record in bundle.manifest.files.items()}
    return {
        "layers": [run.to_json() for run in layer_runs(graph, nodes_by_layer(graph))],
        "precision": [group.to_json() for group in tensor_groups(graph)],
        "components": component_bytes(graph, files),
    }


def _golden(bundle: Bundle) -> dict[str, Any] | None:
    from runtime.golden import Golden
    from runtime.golden_forward import GoldenForward

    if not bundle.has(GOLDEN):
        return None
    if bundle.manifest.task != "text-generation":
        forward = GoldenForward.load(bundle.file(GOLDEN))
        return {"cases": [case.case for case in forward.cases], "limit": forward.limit}
    golden = Golden.load(bundle.file(GOLDEN))
    cases = [step.case for step in golden.steps]
    return {"cases": cases, "slots": golden.slots, "capacity": golden.capacity, "limit": golden.limit}
