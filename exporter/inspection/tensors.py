"""Initializers by what they are for: the precision of each group of tensors, and the bytes of each component."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from exporter.inspection.graph import GraphFacts, Node

# In the order in which they are shown. What is between tensors is at the end.
COMPONENTS = ("embedding", "attention", "mlp", "norms", "rotary", "head", "other")
PADDING = "padding"

_PARTS = re.compile(r"\.(values|scales|zero_points)$")
_PROJECTION = re.compile(r"\b(self_attn|mlp)\.(\w+_proj)\.(weight|bias)\b")
LOOKUPS = ("Gather", "GatherBlockQuantized")
_HEADS = ("lm_head.", "score.", "qa_outputs.")


@dataclass(frozen=True)
class Format:
    """How a tensor is stored.

    Attributes:
        dtype: "fp32", "int4", …
        block: of a rounded matrix, how many weights share a scale; None where a whole row or column does.
        scales: the scales' dtype; None for a tensor that is not rounded.
        zero_points: whether blocks have a zero of their own.
    """

    dtype: str
    block: int | None = None
    scales: str | None = None
    zero_points: bool = False

    @property
    def words(self) -> str:
        """For a person: "int4, blocks of 32, fp32 scales and zero points"."""
        if self.scales is None:
            return self.dtype
        shared = f"blocks of {self.block}" if self.block else "by channel"
        return f"{self.dtype}, {shared}, {self.scales} scales{' and zero points' if self.zero_points else ''}"


@dataclass(frozen=True)
class Group:
    """Tensors of one purpose and one format: how many, and the bytes of all their parts."""

    component: str
    name: str
    format: Format
    tensors: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """An object of `precision` of the command `inspect`."""
        return {
            "group": self.name,
            "component": self.component,
            "dtype": self.format.dtype,
            "block": self.format.block,
            "scales": self.format.scales,
            "zero_points": self.format.zero_points,
            "tensors": self.tensors,
            "bytes": self.bytes,
        }


def tensor_groups(graph: GraphFacts) -> list[Group]:
    """The weights of a graph by purpose and format; constants of the graph's own arithmetic are left out."""
    consumers = graph.consumers()
    formats: dict[str, tuple[str, str, Format]] = {}
    for name, stored in graph.initializers.items():
        readers = consumers.get(name, [])
        component, group = purpose(name, readers)
        if (component, group) != ("other", "other") and not _is_part(name, "scales", "zero_points"):
            read = format_of(graph, readers[0], name) if readers else Format(stored.dtype)
            formats[_whole(name)] = (component, group, read)
    sizes: Counter[tuple[str, str, Format]] = Counter()
    for name, stored in graph.initializers.items():
        if _whole(name) in formats:
            sizes[formats[_whole(name)]] += stored.bytes
    counts = Counter(formats.values())
    order = {key: place for place, key in enumerate(dict.fromkeys(formats.values()))}
    keys = sorted(order, key=lambda key: (COMPONENTS.index(key[0]), order[key]))
    return [Group(component, name, form, counts[component, name, form], sizes[component, name, form])
            for component, name, form in keys]  # fmt: skip


def component_bytes(graph: GraphFacts, files: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the data files by component; what lies between the tensors, or is not read, is the padding.

    Args:
        graph: whose initializers lie in the files.
        files: bytes of every file of the bundle.
    """
    consumers = graph.consumers()
    places: dict[tuple[str, int], tuple[str, int]] = {}  # tied weights may be one place that is read twice
    for name, stored in graph.initializers.items():
        if stored.file is not None:
            component, _ = purpose(name, consumers.get(name, []))
            places.setdefault((stored.file, stored.offset), (component, stored.bytes))
    found = dict.fromkeys(COMPONENTS, 0)
    for component, count in places.values():
        found[component] += count
    total = sum(files[name] for name in data_files(graph))
    return found | {PADDING: total - sum(found.values())}


def data_files(graph: GraphFacts) -> set[str]:
    """Names of the files that the graph's weights lie in."""
    return {stored.file for stored in graph.initializers.values() if stored.file is not None}


def purpose(name: str, readers: Iterable[Node] = ()) -> tuple[str, str]:
    """The component and the group that a tensor belongs to.

    Args:
        name: in a graph or a checkpoint.
        readers: the nodes that read it in a graph: a tied head has the embedding's name.
    """
    if found := _PROJECTION.search(name):
        component = "attention" if found[1] == "self_attn" else "mlp"
        return component, found[2] if found[3] == "weight" else f"{component} biases"
    if "norm." in name:
        return "norms", "norms"
    if "embed_tokens." in name or name.startswith(_HEADS):
        own = "head" if name.startswith(_HEADS) else "embedding"
        if roles := {"embedding" if reader.op_type in LOOKUPS else "head" for reader in readers}:
            own = "embedding" if "embedding" in roles else "head"  # read as both: stored once
        return own, own
    if name.startswith("rope."):
        return "rotary", "rotary tables"
    return "other", "cache scales" if name.startswith("cache.") else "other"


def format_of(graph: GraphFacts, reader: Node, name: str) -> Format:
    """How an initializer is stored, as the operator that reads it says."""
    stored = graph.initializers[name]
    scales = {"MatMulNBits": 2, "GatherBlockQuantized": 2, "DequantizeLinear": 1}.get(reader.op_type)
    if scales is None or name not in reader.inputs[:2]:
        return Format(stored.dtype)
    bits, zeros = reader.attributes.get("bits"), reader.inputs[scales + 1 :][:1]
    return Format(
        f"int{bits}" if bits else stored.dtype,
        reader.attributes.get("block_size") or None,
        graph.initializers[reader.inputs[scales]].dtype,
        bool(zeros and zeros[0]),
    )


def _is_part(name: str, *parts: str) -> bool:
    found = _PARTS.search(name)
    return found is not None and found[1] in parts


def _whole(name: str) -> str:
    return _PARTS.sub("", name)
