"""A network's plugin layers, evaluated by the nodes that they were parsed from, on a fake of TensorRT's network."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from split_cases import Case

from exporter.evaluate.network import compile_network
from exporter.evaluate.program import CannotEvaluate
from exporter.evaluate.session import evaluate_network
from runtime.bundle import Bundle
from runtime.errors import UserError

CASE = Case(4, 2, 32, 16, lengths=(70, 9), sequence=3, capacity=128)
INPUTS = {"query": "HALF", "cos": "HALF", "sin": "HALF", "key_cache": "HALF", "value_cache": "HALF", "lengths": "INT32"}
PARTIALS = {"maxima": "FLOAT", "sums": "FLOAT", "contexts": "FLOAT"}


class ILayer:
    """A layer whose plugin hands nothing out."""

    def __init__(self, name: str, inputs: dict[str, str], outputs: dict[str, str]) -> None:
        self.name, self._inputs, self._outputs = name, tensors(inputs), tensors(outputs)
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)

    @property
    def type(self) -> Any:
        return SimpleNamespace(name="PLUGIN_V3")

    def get_input(self, index: int) -> Any:
        return self._inputs[index]

    def get_output(self, index: int) -> Any:
        return self._outputs[index]


def tensors(named: dict[str, str]) -> list[Any]:
    return [SimpleNamespace(name=name, dtype=SimpleNamespace(name=dtype)) for name, dtype in named.items()]


def network() -> Any:
    """Both plugins over a written cache."""
    given = tensors(INPUTS)
    layers = [
        ILayer("split", INPUTS, PARTIALS),
        ILayer("merge", {**PARTIALS, "lengths": "INT32"}, {"context": "HALF"}),
    ]
    return SimpleNamespace(
        num_inputs=len(given), get_input=given.__getitem__,
        num_outputs=1, get_output=[SimpleNamespace(name="context")].__getitem__,
        num_layers=2, get_layer=layers.__getitem__,
    )  # fmt: skip


def nodes() -> dict[str, Any]:
    """The nodes that the layers were parsed from."""
    marks = {"plugin_namespace": "nemotron_0", "plugin_version": "1", "aot": 1}
    shape = {"heads": 4, "kv_heads": 2, "head_dim": 32, "rotary_dim": 16, "scale": CASE.scale}
    split = ir.node("SplitAttention", [ir.val(n) for n in INPUTS], {**shape, **marks}, domain="nemotron", num_outputs=3)
    given = [*split.outputs, split.inputs[-1]]
    merge = ir.node("MergeAttention", given, {"to": int(ir.DataType.FLOAT16), **marks}, domain="nemotron")
    for value, name in zip((*split.outputs, *merge.outputs), (*PARTIALS, "context"), strict=True):
        value.name = name
    return {"split": ir.to_proto(split), "merge": ir.to_proto(merge)}


TRT: Any = ModuleType("tensorrt")
TRT.ILayer = ILayer


def test_plugins_mean_what_their_nodes_say() -> None:
    program = compile_network(TRT, network(), {}, plugins=nodes())
    arrays = CASE.inputs(np.float16)
    result = program.run(dict(zip(INPUTS, map(torch.from_numpy, arrays), strict=True)))
    assert result.non_finite == []
    found = result.outputs["context"]
    assert found.dtype == torch.float16
    np.testing.assert_allclose(found.float().numpy(), CASE.expected(np.float16), atol=2e-3, rtol=2e-3)


def test_a_plugin_of_somebody_else_is_refused_by_name() -> None:
    with pytest.raises(CannotEvaluate, match="plugin merge"):
        compile_network(TRT, network(), {}, plugins={"split": nodes()["split"]})


def test_the_network_with_plugins_is_tensorrts_and_of_a_gpu(
    tensorrt_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tensorrt_bundle)
    monkeypatch.setattr("exporter.evaluate.session.import_tensorrt", lambda flavor: TRT)
    with pytest.raises(UserError, match="tensorrt-rtx takes no plugins"):
        evaluate_network(bundle, "tensorrt-rtx", attention="plugin")
    monkeypatch.setattr("exporter.evaluate.session.local_capability", lambda: None)
    with pytest.raises(UserError, match=r"no NVIDIA GPU is found here.*--attention native"):
        evaluate_network(bundle, attention="plugin")
