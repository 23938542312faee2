"""What runs a graph of whole rows for the parity gate: ONNX Runtime, or the evaluation of a graph or a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter import __version__
from exporter.evaluate.network import compile_network
from exporter.evaluate.onnx_graph import load_graph
from exporter.evaluate.program import Program
from exporter.evaluate.session import check_for_network, installed
from exporter.evaluate.tensors import as_torch
from exporter.network import parse
from runtime.bundle import Bundle
from runtime.manifest import MODEL
from runtime.ort_model import load_model

Array = NDArray[Any]


@dataclass
class Runner:
    """Runs feeds to outputs, by the graph's names.

    Attributes:
        name: what runs, and its version, as in results.
        run: arrays in, arrays out.
        evaluates: whether every edge is rounded and looked at.
        non_finite: the edges that were not finite so far, of an evaluation.
    """

    name: str
    run: Callable[[Mapping[str, Array]], dict[str, Array]]
    evaluates: bool = False
    non_finite: list[str] = field(default_factory=list)


def onnxruntime_rows(bundle: Bundle) -> Runner:
    """The graph on ONNX Runtime's CPU."""
    loaded = load_model(bundle, "cpu", None)
    names = [spec.name for spec in bundle.manifest.graph.outputs]

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with loaded.running("whole rows"):
            return dict(zip(names, loaded.model.run(names, dict(feeds)), strict=True))

    return Runner(f"{loaded.backend} {loaded.version}", run)


def evaluate_graph_rows(bundle: Bundle) -> Runner:
    """The graph, evaluated."""
    name = f"nemotron-export evaluation of the ONNX graph {__version__}"
    return _evaluated(name, load_graph(bundle.file(MODEL)))


def evaluate_network_rows(bundle: Bundle) -> Runner:
    """What the installed TensorRT's parser makes of the graph, mended as `build` mends it, evaluated.

    Raises:
        UserError: the bundle is of another target, or no TensorRT is installed.
    """
    check_for_network(bundle)
    flavor, trt = installed()
    parsed = parse(trt, bundle, bundle.manifest.max_length)
    parsed.mend()
    constants = load_graph(bundle.file(MODEL)).constants
    program = compile_network(trt, parsed.network, constants, owner=parsed)
    return _evaluated(f"nemotron-export evaluation of the {flavor} network {trt.__version__}", program)


def _evaluated(name: str, program: Program) -> Runner:
    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        result = program.run({key: as_torch(np.ascontiguousarray(array)) for key, array in feeds.items()})
        runner.non_finite += result.non_finite
        return {key: tensor.float().numpy() for key, tensor in result.outputs.items()}

    runner = Runner(name, run, evaluates=True)
    return runner
