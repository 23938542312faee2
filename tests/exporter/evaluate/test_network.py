"""What TensorRT's parser makes of a graph, evaluated: right when it is mended, wrong in numbers when it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporter.checkpoint import Checkpoint
from exporter.evaluate import ops
from exporter.evaluate.network import compile_network
from exporter.evaluate.network_layers import LOWER_RIGHT_COUNTS_FROM_LENGTHS
from exporter.evaluate.onnx_graph import load_graph
from exporter.evaluate.program import CannotEvaluate
from exporter.evaluate.session import EvaluatedSession, evaluate_network, installed
from exporter.network import parse
from exporter.verify import LIMIT, run_gate, verify
from plugins.tensorrt_network import CAUSALITIES, attentions
from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.golden import replay
from runtime.measured import Comparison

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")


def compared(bundle: Bundle, checkpoint: Path, change: Callable[[Any], None]) -> dict[tuple[str, str], Comparison]:
    """The gate on the mended network of a bundle, with a change made to each of its attentions."""

    def program(capacity: int) -> Any:
        parsed = parse(trt, bundle, capacity)
        parsed.mend()
        for attention in attentions(trt, parsed.network):
            change(attention)
        return compile_network(trt, parsed.network, load_graph(bundle.file("model.onnx")).constants, parsed)

    session = EvaluatedSession(bundle, program, "network", "0")
    found = run_gate(bundle, Checkpoint.open(checkpoint), session).parity.comparisons
    return {(comparison.name, comparison.case): comparison for comparison in found}


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_a_mended_network_is_the_model(
    causality: str, tensorrt_bundle_of: Callable[[str], Path], tiny_checkpoint: Path
) -> None:
    bundle = Bundle.open(tensorrt_bundle_of("fp32"))
    session = evaluate_network(bundle, "tensorrt-rtx", causality)
    parity = run_gate(bundle, Checkpoint.open(tiny_checkpoint), session).parity
    assert parity.passed
    assert {c.limit for c in parity.comparisons if c.name in {"logits", "present"}} == {LIMIT}
    assert parity.evaluated_by == f"nemotron-export evaluation of the tensorrt-rtx network {trt.__version__}"


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_mended_network_passes_in_16_bit(
    precision: str, tensorrt_bundle_of: Callable[[str], Path], tiny_checkpoint: Path
) -> None:
    assert verify(tensorrt_bundle_of(precision), tiny_checkpoint, network=True).passed


def no_lengths(attention: Any) -> None:
    """The parser drops nonpad_kv_seqlen: the whole capacity counts."""
    attention.key_value_lengths = None


def upper_left(attention: Any) -> None:
    """The parser's is_causal=1: a decode step sees key 0 alone."""
    attention.causal_kind = trt.CausalMaskKind.UPPER_LEFT


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("trap", [no_lengths, upper_left], ids=lambda trap: trap.__name__)
def test_each_of_the_parsers_silent_traps_alone_is_seen_in_the_numbers(
    trap: Callable[[Any], None], precision: str, tensorrt_bundle_of: Callable[[str], Path], tiny_checkpoint: Path
) -> None:
    found = compared(Bundle.open(tensorrt_bundle_of(precision)), tiny_checkpoint, trap)
    for case in ("chunk", "decode"):
        value = found["logits", case].value
        assert value is not None
        assert value > 1
        assert not found["logits", case].passed
    # A prefill from position 0 is right with the upper left corner: a check that only prefills would pass it.
    assert found["logits", "prefill"].passed is (trap is upper_left)


def test_the_assumption_has_a_name() -> None:
    assert LOWER_RIGHT_COUNTS_FROM_LENGTHS == "lower-right causality counts from key_value_lengths"


def test_a_bundle_for_another_target_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(UserError, match="is for onnxruntime; export it with --target tensorrt"):
        evaluate_network(Bundle.open(tiny_bundle))


def test_without_tensorrt_both_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("runtime.tensorrt_api.import_module", missing)
    with pytest.raises(UserError, match=r"nemotron-export\[tensorrt\].*nemotron-export\[rtx\]"):
        installed()


@pytest.fixture
def network() -> Iterator[Any]:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    yield builder.create_network(0)
    del builder


def run(network: Any, output: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    output.name = "y"
    network.mark_output(output)
    program = compile_network(trt, network, {})
    return program.run({name: torch.from_numpy(array) for name, array in feeds.items()}).outputs["y"].numpy()


X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


def constant(network: Any, values: Any, dtype: Any = np.int64) -> Any:
    array = np.array(values, dtype)
    constant.alive.append(array)  # type: ignore[attr-defined]
    return network.add_constant(array.shape, trt.Weights(array)).get_output(0)


constant.alive = []  # type: ignore[attr-defined]


def shuffled(network: Any, x: Any) -> Any:
    layer = network.add_shuffle(x)
    layer.first_transpose = (1, 0, 2)
    layer.reshape_dims = (0, -1)
    layer.second_transpose = (1, 0)
    return layer


def normalized(network: Any, x: Any) -> Any:
    ones = [constant(network, np.full((1, 1, 4), value), np.float32) for value in (2.0, 0.5)]
    layer = network.add_normalization_v2(x, *ones, 1 << 2)
    layer.epsilon = 0.25
    return layer


def concatenated(network: Any, x: Any) -> Any:
    layer = network.add_concatenation([x, x])
    layer.axis = 1
    return layer


LAYERS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[np.ndarray], np.ndarray]]] = {
    "shuffle": (shuffled, lambda x: x.transpose(1, 0, 2).reshape(3, -1).T),
    "slice": (lambda n, x: n.add_slice(x, (0, 1, 0), (2, 2, 2), (1, 1, 2)), lambda x: x[:, 1:3, ::2]),
    "relu": (lambda n, x: n.add_activation(x, trt.ActivationType.RELU), lambda x: np.maximum(x, 0)),
    "negative": (lambda n, x: n.add_unary(x, trt.UnaryOperation.NEG), np.negative),
    "difference": (lambda n, x: n.add_elementwise(x, x, trt.ElementWiseOperation.SUB), np.zeros_like),
    "transposed product": (
        lambda n, x: n.add_matrix_multiply(x, trt.MatrixOperation.NONE, x, trt.MatrixOperation.TRANSPOSE),
        lambda x: x @ x.swapaxes(1, 2),
    ),
    "sum": (lambda n, x: n.add_reduce(x, trt.ReduceOperation.SUM, 0b110, False), lambda x: x.sum((1, 2))),
    "gather": (lambda n, x: n.add_gather(x, constant(n, [2, 0]), 1), lambda x: x[:, [2, 0]]),
    "concatenation": (concatenated, lambda x: np.concatenate([x, x], 1)),
    "shape": (lambda n, x: n.add_shape(x), lambda x: np.array(x.shape)),
    "cast": (lambda n, x: n.add_cast(x, trt.float16), lambda x: x.astype(np.float16)),
    "unsqueeze": (lambda n, x: n.add_unsqueeze(x, constant(n, [0])), lambda x: x[None]),
    "normalization": (
        normalized,
        lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 0.25) * 2 + 0.5,
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_means_what_the_api_says(kind: str, network: Any) -> None:
    build, expected = LAYERS[kind]
    layer = build(network, network.add_input("x", trt.float32, X.shape))
    np.testing.assert_allclose(run(network, layer.get_output(0), {"x": X}), expected(X), atol=1e-6)


def test_cache_writes_beyond_the_capacity_are_dropped_as_on_the_device(network: Any) -> None:
    cache = network.add_input("cache", trt.float32, (1, 2, 4, 8))
    update = network.add_input("update", trt.float32, (1, 2, 3, 8))
    start = network.add_input("start", trt.int32, (1,))
    layer = network.add_kv_cache_update(cache, update, start, trt.KVCacheMode.LINEAR)
    new = np.ones((1, 2, 3, 8), np.float32)
    feeds = {"cache": np.zeros((1, 2, 4, 8), np.float32), "update": new, "start": np.array([2], np.int32)}
    assert run(network, layer.get_output(0), feeds)[0, 0, :, 0].tolist() == [0, 0, 1, 1]


def test_an_unknown_layer_type_is_refused_by_name(network: Any) -> None:
    layer = network.add_topk(network.add_input("x", trt.float32, X.shape), trt.TopKOperation.MAX, 1, 1)
    layer.name = "the best"
    with pytest.raises(CannotEvaluate, match="knows no layer type TOPK of the best"):
        compile_network(trt, network, {})


def test_an_unknown_value_of_an_attribute_is_refused_by_name(network: Any) -> None:
    layer = network.add_slice(network.add_input("x", trt.float32, X.shape), (0, 0, 0), (2, 3, 4), (1, 1, 1))
    layer.mode, layer.name = trt.SampleMode.WRAP, "the slice"
    with pytest.raises(CannotEvaluate, match="knows no mode WRAP of the slice"):
        compile_network(trt, network, {})


def test_the_golden_cases_fail_where_the_corner_is_counted_from_the_static_capacity(
    tensorrt_bundle_of: Callable[[str], Path], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other reading of lower-right: an engine that relies on the first must not pass on a device of the second."""
    bundle = Bundle.open(tensorrt_bundle_of("fp32"))
    golden = run_gate(bundle, Checkpoint.open(tiny_checkpoint), evaluate_network(bundle, "tensorrt-rtx")).golden
    assert golden is not None
    assert all(row.passed for row in replay(evaluate_network(bundle, "tensorrt-rtx"), golden))

    causal = ops.causal
    monkeypatch.setattr(ops, "causal", lambda queries, keys, _: causal(queries, keys, torch.tensor([keys - queries])))
    rows = replay(evaluate_network(bundle, "tensorrt-rtx"), golden)
    assert not next(row for row in rows if row.case == "prefill").passed
