"""What TensorRT's parser makes of the trained checkpoint's graph, before and after it is mended. Needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plugins.tensorrt_network import CAUSALITIES, MASK, NetworkMismatch, attentions, check_mended, count_layers, mend

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx (pip install 'nemotron-export[rtx]')")

LAYERS, HEADS, KV_HEADS, HEAD_DIM, CAPACITY = 4, 4, 2, 64, 96
PRECISIONS = ("fp32", "fp16", "bf16")
DTYPES = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.bfloat16}

Parse = Callable[..., Any]


@pytest.fixture
def parsed(tensorrt_bundle_of: Callable[[str], Path]) -> Parse:
    """`parsed(precision)`: the parser's network, its graph's operators and scales."""
    from exporter.network import parse
    from runtime.bundle import Bundle

    return lambda precision="fp16": parse(trt, Bundle.open(tensorrt_bundle_of(precision)), CAPACITY)


def mended(network: Any, **changes: Any) -> Any:
    return mend(trt, network.network, **{"operators": network.operators, "scales": network.scales, **changes})


def producer(network: Any, tensor: Any) -> Any:
    """The layer that makes a tensor, as its own class."""
    for layer in map(network.get_layer, range(network.num_layers)):
        if tensor.name in [layer.get_output(i).name for i in range(layer.num_outputs)]:
            classes = {"ELEMENTWISE": trt.IElementWiseLayer, "CONSTANT": trt.IConstantLayer}
            layer.__class__ = classes.get(layer.type.name, layer.__class__)
            return layer
    raise AssertionError(f"{tensor.name} is made by no layer")


def above(network: Any, tensor: Any) -> Iterator[Any]:
    """The layers above a tensor along their first input, up to the first rotary layer."""
    while True:
        layer = producer(network, tensor)
        yield layer
        if layer.type == trt.LayerType.ROTARY_EMBEDDING:
            return
        tensor = layer.get_input(0)


def test_what_the_parser_makes_would_see_one_key_at_each_step(parsed: Parse) -> None:
    """Where this fails the parser has changed: mending may not be needed any more, or not be enough."""
    network = parsed().network
    for attention in attentions(trt, network):
        assert attention.causal_kind == trt.CausalMaskKind.UPPER_LEFT
        assert attention.key_value_lengths is None
        assert producer(network, attention.get_input(1)).type == trt.LayerType.ELEMENTWISE
    with pytest.raises(NetworkMismatch, match="takes its keys from ELEMENTWISE, not from KV_CACHE_UPDATE"):
        check_mended(trt, network)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_attention_ends_at_its_rows_length(parsed: Parse, precision: str) -> None:
    network = parsed(precision)
    assert mended(network).layers == {"attention": LAYERS, "kv_cache_update": 2 * LAYERS, "rotary": 2 * LAYERS}
    found = list(attentions(trt, network.network))
    assert len(found) == LAYERS
    for attention in found:
        assert attention.causal_kind == trt.CausalMaskKind.LOWER_RIGHT
        assert attention.mask is None
        assert attention.key_value_lengths.dtype == trt.int32
        assert tuple(attention.key_value_lengths.shape) == (-1,)
    assert len({attention.key_value_lengths.name for attention in found}) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_mask_bounds_every_query_by_its_position(parsed: Parse, precision: str) -> None:
    network = parsed(precision)
    mended(network, causality=MASK)
    for attention in attentions(trt, network.network):
        assert attention.causal_kind == trt.CausalMaskKind.NONE
        assert attention.key_value_lengths is None
        assert attention.mask.dtype == trt.bool
        assert tuple(attention.mask.shape) == (-1, 1, -1, CAPACITY)


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_missing_kernel_is_an_error_in_16_bit(parsed: Parse, precision: str, causality: str) -> None:
    network = parsed(precision)
    mended(network, causality=causality)
    decomposable = {attention.decomposable for attention in attentions(trt, network.network)}
    assert decomposable == {precision == "fp32"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_cache_is_read_as_it_is(parsed: Parse, precision: str) -> None:
    """A multiplication here would read and write the whole cache at every step."""
    network = parsed(precision)
    mended(network)
    for layer, attention in enumerate(attentions(trt, network.network)):
        for index, kind in ((1, "key"), (2, "value")):
            tensor = attention.get_input(index)
            assert producer(network.network, tensor).type == trt.LayerType.KV_CACHE_UPDATE
            assert tensor.name == f"present.{layer}.{kind}"
            assert tuple(tensor.shape) == (-1, KV_HEADS, CAPACITY, HEAD_DIM)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_queries_are_scaled_once_in_fp32(parsed: Parse, precision: str) -> None:
    network = parsed(precision)
    mended(network)
    for attention in attentions(trt, network.network):
        query = attention.get_input(0)
        assert query.dtype == DTYPES[precision]
        layers = list(above(network.network, query))
        products = [layer for layer in layers if layer.type == trt.LayerType.ELEMENTWISE]
        assert [layer.op for layer in products] == [trt.ElementWiseOperation.PROD]
        assert products[0].get_output(0).dtype == trt.float32
        factor = producer(network.network, products[0].get_input(1)).weights
        np.testing.assert_array_equal(np.asarray(factor).ravel(), np.float32(HEAD_DIM**-0.5))
        others = {layer.type.name for layer in layers} - {"ELEMENTWISE"}
        assert others == ({"ROTARY_EMBEDDING"} if precision == "fp32" else {"CAST", "ROTARY_EMBEDDING"})


@pytest.mark.parametrize("operator", ["Attention", "TensorScatter", "RotaryEmbedding"])
def test_a_layer_that_the_parser_decomposed_is_missed(parsed: Parse, operator: str) -> None:
    network = parsed()
    more = {**network.operators, operator: network.operators[operator] + 1}
    with pytest.raises(NetworkMismatch, match=r"the graph holds .*, the parser made 4 attention, 8 kv_cache_update"):
        mended(network, operators=more)


def test_a_scale_that_is_not_the_graphs_is_refused(parsed: Parse) -> None:
    network = parsed()
    with pytest.raises(NetworkMismatch, match=r"is scaled by 0\.35\d* · 0\.35\d*, its graph says 0\.25"):
        mended(network, scales=dict.fromkeys(network.scales, 0.25))


def test_an_attention_that_the_graph_does_not_name_is_refused(parsed: Parse) -> None:
    with pytest.raises(NetworkMismatch, match="is the name of no Attention in the graph"):
        mended(parsed(), scales={})


@pytest.mark.parametrize("causality", CAUSALITIES)
def test_a_network_already_mended_is_refused(parsed: Parse, causality: str) -> None:
    """A parser that stops scaling gives such a network: scaling it again would be wrong."""
    network = parsed()
    mended(network, causality=causality)
    with pytest.raises(NetworkMismatch, match="no longer scales both queries and keys"):
        mended(network, causality=causality)


def test_layers_are_counted_by_kind(parsed: Parse) -> None:
    assert count_layers(trt, parsed().network) == {"attention": 4, "kv_cache_update": 8, "rotary": 8}
