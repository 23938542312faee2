"""One decoder layer of a graph as an SVG that needs nothing else: operators, what goes between them, residuals."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from exporter.inspection.graph import GraphFacts, Node, dtype_name
from exporter.inspection.layers import layer_runs, nodes_by_layer
from exporter.inspection.layout import Placed, place
from exporter.parameters import LAYERS
from runtime.errors import UserError

_FONT, _LINE, _PAD = 11, 15, 9  # pixels: the font's size, a line's height, and what is around text
_CHAR = 0.64 * _FONT  # a character of a monospaced font, which is 0.6 wide, or a little more
_GAP = (24.0, 34.0)  # between boxes, and between ranks
_RESIDUAL = "residual"
_MARGIN, _TITLE = 16.0, 34.0
_WIDTH = 38  # characters of a line of attributes

_STYLE = """
text { font: 11px "DejaVu Sans Mono", Menlo, Consolas, monospace; fill: #1c2330; }
.title { font-size: 13px; font-weight: bold; } .op { font-weight: bold; }
.more { fill: #55607a; } .value { fill: #2f5d3a; }
.plain .box { fill: #eef2fb; stroke: #5b6b8c; } .fused .box { fill: #ffeecf; stroke: #b27a16; }
.ground { fill: #fff; stroke: none; } .outside .box { fill: #fff; stroke: #8a94a8; stroke-dasharray: 4 3; }
path { fill: none; stroke: #5b6b8c; stroke-width: 1.2; } .residual { stroke: #c0392b; stroke-width: 2.2; }
"""
_FUSED = ("GroupQueryAttention", "Attention", "RotaryEmbedding", "TensorScatter", "MatMulNBits", "LayerNormalization")


@dataclass(frozen=True)
class _Box:
    """A rectangle with lines of text, the first one bold; below it what comes out of it."""

    kind: str
    op: str
    lines: tuple[str, ...]
    below: str = ""

    @property
    def size(self) -> tuple[float, float]:
        """Width and height, with what is below."""
        width = max(len(line) for line in (self.op, *self.lines, self.below))
        return width * _CHAR + 2 * _PAD, self.height + (_LINE if self.below else 0)

    @property
    def height(self) -> float:
        """Of the rectangle alone."""
        return (1 + len(self.lines)) * _LINE + _PAD


def draw_layer(graph: GraphFacts, bundle: Path) -> str:
    """The SVG of a layer: of those that are made alike, the first of the most.

    Args:
        graph: read with `complete`, so that every edge has its dtype and shape.
        bundle: named in the title.

    Raises:
        UserError: the graph has no decoder layers.
    """
    layers = nodes_by_layer(graph)
    if not any(layers):
        raise UserError(f"{bundle} has no decoder layers to draw; export the bundle again")
    run = max(layer_runs(graph, layers), key=lambda run: run.last - run.first)
    alike = f" ({run.first}–{run.last} are alike)" if run.last > run.first else ""
    boxes, edges = _diagram(graph, layers[run.first], f"{LAYERS}{run.first}.")
    placed = place({name: box.size for name, box in boxes.items()}, edges, _GAP, passing=len(_RESIDUAL) * _CHAR)
    title = f"{bundle.resolve().name}: layer {run.first} of {len(layers)}{alike}"
    return _svg(title, boxes, edges, placed)


def _diagram(graph: GraphFacts, nodes: list[Node], prefix: str) -> tuple[dict[str, _Box], dict[tuple[str, str], str]]:
    """The boxes by name, and the edges between them with what they carry."""
    makers = {value: node.outputs[0] for node in nodes for value in node.outputs if value}
    boxes = {node.outputs[0]: _operator(graph, node, prefix) for node in nodes}
    carried: dict[tuple[str, str], list[str]] = {}
    outside: dict[str, list[str]] = {}  # values from before the layer, with the boxes that they go to
    for node in nodes:
        for value in dict.fromkeys(node.inputs):
            if value in makers:
                carried.setdefault((makers[value], node.outputs[0]), []).append(value)
            elif value and value not in graph.initializers:
                outside.setdefault(value, []).append(node.outputs[0])
    together: dict[tuple[str, ...], list[str]] = {}  # those that go to the same boxes share one
    for value, targets in outside.items():
        together.setdefault(tuple(targets), []).append(value)
    for readers, values in together.items():
        boxes[f"from {values[0]}"] = _outside(graph, "from outside", values)
        carried |= {(f"from {values[0]}", reader): values for reader in readers}
    for maker, values in _leaving(graph, nodes, set(makers.values())).items():
        boxes[f"to {values[0]}"] = _outside(graph, "to outside", values)
        carried[maker, f"to {values[0]}"] = values
    return boxes, {edge: "; ".join(_typed(graph, value) for value in values) for edge, values in carried.items()}


def _outside(graph: GraphFacts, what: str, values: list[str]) -> _Box:
    return _Box("outside", what, tuple(_typed(graph, value, named=True) for value in values))


def _leaving(graph: GraphFacts, nodes: list[Node], inside: set[str]) -> dict[str, list[str]]:
    """By maker, the values that are read after the layer or handed out."""
    consumers, found = graph.consumers(), dict[str, list[str]]()
    for node in nodes:
        for value in node.outputs:
            readers = consumers.get(value, ())
            if value in graph.outputs or any(reader.outputs[0] not in inside for reader in readers):
                found.setdefault(node.outputs[0], []).append(value)
    return found


def _operator(graph: GraphFacts, node: Node, prefix: str) -> _Box:
    settings = ", ".join(f"{name}={_setting(name, value)}" for name, value in node.attributes.items())
    weights = [
        f"{_short(name, prefix)} {_shaped(stored.dtype, stored.shape)}"
        for name in dict.fromkeys(node.inputs)
        if (stored := graph.initializers.get(name)) is not None
    ]
    lines = (*textwrap.wrap(settings, _WIDTH), *weights)
    kind = "fused" if node.op_type in _FUSED else "plain"
    return _Box(kind, node.qualified, lines, _typed(graph, node.outputs[0]))


def _setting(name: str, value: Any) -> str:
    if name in {"to", "stash_type"} and isinstance(value, int):
        return dtype_name(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value).replace(" ", "")


def _short(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).removeprefix("self_attn.").removeprefix("mlp.").replace(".transposed", "")


def _typed(graph: GraphFacts, value: str, *, named: bool = False) -> str:
    known = graph.values.get(value)
    told = _shaped(known.dtype, known.shape) if known else "of unknown shape"
    return f"{value} {told}" if named else told


def _shaped(dtype: str, shape: Iterable[int | str]) -> str:
    named = ("?" if str(dim).startswith("unk__") else str(dim) for dim in shape)  # onnx's word for what it cannot infer
    return f"{dtype} [{', '.join(named)}]"


def _svg(title: str, boxes: dict[str, _Box], edges: dict[tuple[str, str], str], placed: Placed) -> str:
    width = max(placed.width, len(title) * 0.61 * 13) + 2 * _MARGIN
    height = placed.height + _TITLE + 2 * _MARGIN
    root = ElementTree.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", width=f"{width:.0f}", height=f"{height:.0f}",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
    )  # fmt: skip
    ElementTree.SubElement(root, "title").text = title
    ElementTree.SubElement(root, "style").text = _STYLE
    marker = ElementTree.SubElement(
        root, "marker", id="arrow", viewBox="0 0 8 8", refX="7", refY="4", markerWidth="7", markerHeight="7",
        orient="auto", markerUnits="userSpaceOnUse",
    )  # fmt: skip
    ElementTree.SubElement(marker, "polygon", points="0,0 8,4 0,8", fill="#5b6b8c")
    ElementTree.SubElement(root, "rect", {"class": "ground", "width": "100%", "height": "100%"})
    _text(root, title, _MARGIN, _MARGIN + 13, "title", anchor="start")
    body = ElementTree.SubElement(root, "g", transform=f"translate({_MARGIN:.0f} {_MARGIN + _TITLE:.0f})")
    for (source, target), carries in edges.items():
        _edge(body, source, target, carries, boxes, placed)
    for name, box in boxes.items():
        _box(body, name, box, placed.centre[name])
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _edge(
    body: ElementTree.Element, source: str, target: str, carries: str, boxes: dict[str, _Box], placed: Placed
) -> None:
    points = placed.routes[source, target]
    drawn = f"M{points[0][0]:.1f},{points[0][1]:.1f}"
    for (x, y), (left, below) in pairwise(points):
        middle = (y + below) / 2
        drawn += f" C{x:.1f},{middle:.1f} {left:.1f},{middle:.1f} {left:.1f},{below:.1f}"
    residual = boxes[target].op == "Add" and len(points) > 2
    path = ElementTree.SubElement(
        body, "path", {"d": drawn, "class": "residual" if residual else "edge", "marker-end": "url(#arrow)",
                       "data-from": source, "data-to": target},
    )  # fmt: skip
    ElementTree.SubElement(path, "title").text = carries
    if residual:
        _value(body, _RESIDUAL, points[1][0], points[1][1] + _LINE)


def _box(body: ElementTree.Element, name: str, box: _Box, centre: tuple[float, float]) -> None:
    width, height, (x, top) = box.size[0], box.height, centre
    group = ElementTree.SubElement(body, "g", {"class": box.kind, "data-name": name, "data-op": box.op})
    corner = {"x": f"{x - width / 2:.1f}", "y": f"{top:.1f}", "rx": "4"}
    ElementTree.SubElement(
        group, "rect", {"class": "box", **corner, "width": f"{width:.1f}", "height": f"{height:.1f}"}
    )
    _text(group, box.op, x, top + _LINE, "op")
    for at, line in enumerate(box.lines, 2):
        _text(group, line, x, top + at * _LINE, "more")
    if box.below:
        _value(group, box.below, x, top + height + 13)


def _value(parent: ElementTree.Element, text: str, x: float, y: float) -> None:
    """Text that lies on edges."""
    width = len(text) * _CHAR
    ElementTree.SubElement(
        parent, "rect", {"class": "ground", "x": f"{x - width / 2:.1f}", "y": f"{y - 10:.1f}", "width": f"{width:.1f}",
                         "height": "13"},
    )  # fmt: skip
    _text(parent, text, x, y, "value")


def _text(parent: ElementTree.Element, text: str, x: float, y: float, kind: str, anchor: str = "middle") -> None:
    settings = {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": kind, "text-anchor": anchor}
    ElementTree.SubElement(parent, "text", settings).text = text
