"""What TensorRT's ONNX parser makes of our attention, mended into what the graph means.

The parser drops `nonpad_kv_seqlen`, anchors `is_causal` at the upper left, so that a decode step would see key 0 alone,
and multiplies the queries and the whole key cache by √scale in the working precision at every step; none of it with a
warning. Each attention is given its lengths, its corner, the cache as it is, and queries scaled once in fp32. Graphs
without a cache bring a mask of their own, which the parser keeps; there the scaling alone is mended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LOWER_RIGHT = "lower-right"
MASK = "mask"
CAUSALITIES = (LOWER_RIGHT, MASK)

# TensorRT documents lower-right as "j <= i + (s_kv - s_q)" and `key_value_lengths` apart from it. That s_kv is a row's
# length where lengths are given, and not the static capacity of the cache, is written nowhere; an engine that relies on
# it says so in its record, and proves itself by its golden cases on the GPU that first loads it. `mask` does without.
LENGTHS_ASSUMPTION = "lower-right causality counts from key_value_lengths"

# ONNX takes the softmax of a 16-bit Attention in 16 bit unless `softmax_precision` says otherwise, and the parser
# refuses that attribute. TensorRT's kernels are taken to compute it in fp32, as transformers and the evaluation do.
SOFTMAX_ASSUMPTION = "softmax of 16-bit attention is computed in fp32"

# What the attention kernels rely on, as plugins that are compiled ahead of time (`plugins.kernels`).
PLUGIN_ASSUMPTIONS = (
    "ahead-of-time plugins are launched as tensorrt.plugin's Python says",
    "a plugin reads the updated cache where it lies, without a copy",
)

# The layers that must come out of the parser, one for each operator of the graph.
_LAYERS = {
    "attention": ("Attention", "ATTENTION_INPUT"),
    "kv_cache_update": ("TensorScatter", "KV_CACHE_UPDATE"),
    "rotary": ("RotaryEmbedding", "ROTARY_EMBEDDING"),
}
_PLUGINS = ("SplitAttention", "MergeAttention")  # a layer each, of networks that have them
_MERGED = 4  # inputs of MergeAttention; SplitAttention has more


class NetworkMismatch(Exception):
    """The parser's network is not of the form that is mended; the message says what was expected and what was found."""


@dataclass(frozen=True)
class Mended:
    """A mended network: how many layers of each kind it has, and the constants that it refers to until it is built."""

    layers: dict[str, int]
    constants: list[Any] = field(repr=False)


def mend(
    trt: Any,
    network: Any,
    *,
    operators: Mapping[str, int],
    scales: Mapping[str, float],
    causality: str = LOWER_RIGHT,
    input_ids: str = "input_ids",
    write_indices: str = "write_indices",
) -> Mended:
    """Make every attention of a parsed network causal from the end of each row's real keys, in place.

    Args:
        trt: TensorRT's module.
        network: what the parser made, an INetworkDefinition with static cache capacity.
        operators: how many of each operator the ONNX graph has, by op type.
        scales: the scale of each ONNX Attention, by node name.
        causality: LOWER_RIGHT, or MASK to build an explicit mask, which assumes nothing undocumented.
        input_ids: the network's input int64 [batch, sequence].
        write_indices: the network's input int64 [batch], the position of each row's first new token.

    Raises:
        NetworkMismatch: the parser made something else of the graph than what is known here.
    """
    layers = count_layers(trt, network)
    expected = {kind: operators.get(operator, 0) for kind, (operator, _) in _LAYERS.items()}
    plugins = sum(operators.get(name, 0) for name in _PLUGINS)
    if plugins:
        expected["plugin"], layers["plugin"] = plugins, len(_plugins(trt, network))
    if layers != expected:
        raise NetworkMismatch(f"the graph holds {_listed(expected)}, the parser made {_listed(layers)}")
    add, cached = _Adder(trt, network), layers["kv_cache_update"] > 0
    inputs = {tensor.name: tensor for tensor in map(network.get_input, range(network.num_inputs))}
    for name in (input_ids, write_indices):
        if cached and name not in inputs:
            raise NetworkMismatch(f"the network has no input {name}")
    producers = _producers(network)
    bound = None
    for attention in attentions(trt, network):
        _unscale(trt, add, producers, attention, scales)
        if cached and bound is None:
            if causality == LOWER_RIGHT:
                bound = _lengths(trt, add, inputs[input_ids], inputs[write_indices])
            else:
                bound = _mask(trt, add, _rotary_positions(trt, network), attention.get_input(1).shape[2])
        if cached:
            _make_causal(trt, attention, causality, bound)
        attention.decomposable = attention.get_input(0).dtype == trt.float32
    check_mended(trt, network)
    if plugins:
        check_plugins(trt, network)
    return Mended(layers, add.constants)


def count_layers(trt: Any, network: Any) -> dict[str, int]:
    """How many native layers of each of our kinds a network has: attention, kv_cache_update, rotary."""
    types = [layer.type for layer in _layers(network)]
    return {kind: types.count(getattr(trt.LayerType, layer)) for kind, (_, layer) in _LAYERS.items()}


def _plugins(trt: Any, network: Any) -> list[Any]:
    return [layer for layer in _layers(network) if layer.type == trt.LayerType.PLUGIN_V3]


def attentions(trt: Any, network: Any) -> Iterator[Any]:
    """Every IAttention of a network."""
    for layer in _layers(network):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer
            yield layer.attention


def check_mended(trt: Any, network: Any) -> None:
    """Check by structure what no number shows: keys and values come from the cache with no layer between.

    Raises:
        NetworkMismatch: an attention that takes something else, or is not causal in either way.
    """
    producers = _producers(network)
    cached = count_layers(trt, network)["kv_cache_update"] > 0
    for attention in attentions(trt, network):
        if cached:
            _check_source(producers, attention, keys=1, values=2)
        lower_right = attention.causal_kind == trt.CausalMaskKind.LOWER_RIGHT and attention.key_value_lengths
        masked = attention.causal_kind == trt.CausalMaskKind.NONE and attention.mask
        if not (lower_right or masked):
            raise NetworkMismatch(f"{attention.name} has neither lengths with a lower-right corner nor a mask")


def check_plugins(trt: Any, network: Any) -> None:
    """Check the same of the kernels' plugins, of which those that read a cache have it as inputs 3 and 4.

    Raises:
        NetworkMismatch: one that takes something else.
    """
    producers = _producers(network)
    for plugin in _plugins(trt, network):
        if plugin.num_inputs > _MERGED:
            _check_source(producers, plugin, keys=3, values=4)


def _check_source(producers: Mapping[str, Any], reader: Any, **inputs: int) -> None:
    for what, index in inputs.items():
        producer = producers.get(reader.get_input(index).name)
        kind = producer.type.name if producer is not None else "a network input"
        if kind != "KV_CACHE_UPDATE":
            raise NetworkMismatch(f"{reader.name} takes its {what} from {kind}, not from KV_CACHE_UPDATE")


def _unscale(trt: Any, add: _Adder, producers: dict[str, Any], attention: Any, scales: Mapping[str, float]) -> None:
    """Take the parser's two multiplications by √scale away, and multiply the queries by the scale once in fp32."""
    if attention.name not in scales:
        raise NetworkMismatch(f"{attention.name} is the name of no Attention in the graph")
    scaled = [_product(trt, producers, attention.get_input(index)) for index in (0, 1)]
    if None in scaled:
        raise NetworkMismatch(f"{attention.name}: the parser no longer scales both queries and keys by a constant")
    (query, query_factor), (key, key_factor) = (pair for pair in scaled if pair is not None)
    scale = scales[attention.name]
    if not np.isclose(query_factor * key_factor, scale, rtol=1e-5):
        raise NetworkMismatch(f"{attention.name} is scaled by {query_factor} · {key_factor}, its graph says {scale}")
    exact = add.cast(query, trt.float32)
    factor = add.constant(np.full((1, 1, 1, 1), scale, np.float32))
    product = add.elementwise(exact, factor, trt.ElementWiseOperation.PROD)
    attention.set_input(0, add.cast(product, query.dtype))
    attention.set_input(1, key)


def _product(trt: Any, producers: dict[str, Any], tensor: Any) -> tuple[Any, float] | None:
    """The tensor and the constant whose product a tensor is; None where it is something else."""
    layer = producers.get(tensor.name)
    if layer is None or layer.type != trt.LayerType.ELEMENTWISE:
        return None
    layer.__class__ = trt.IElementWiseLayer
    source = producers.get(layer.get_input(1).name)
    while source is not None and source.type == trt.LayerType.CAST:
        source = producers.get(source.get_input(0).name)
    if layer.op != trt.ElementWiseOperation.PROD or source is None or source.type != trt.LayerType.CONSTANT:
        return None
    source.__class__ = trt.IConstantLayer
    factor = np.asarray(source.weights).ravel()
    return (layer.get_input(0), float(factor[0])) if factor.size == 1 else None


def _make_causal(trt: Any, attention: Any, causality: str, bound: Any) -> None:
    if causality == LOWER_RIGHT:
        attention.causal_kind = trt.CausalMaskKind.LOWER_RIGHT
        attention.key_value_lengths = bound
    else:
        attention.causal_kind = trt.CausalMaskKind.NONE
        attention.mask = bound


def _lengths(trt: Any, add: _Adder, input_ids: Any, write_indices: Any) -> Any:
    """int32 [batch]: the keys that each row has after this step, `write_indices + sequence`."""
    sequence = add.slice(add.shape(input_ids), [1], [1], [1])
    return add.cast(add.elementwise(write_indices, sequence, trt.ElementWiseOperation.SUM), trt.int32)


def _mask(trt: Any, add: _Adder, positions: Any, capacity: int) -> Any:
    """bool [batch, 1, sequence, capacity]: true where a key's position is at most the query's."""
    keys = add.constant(np.arange(capacity, dtype=np.int64).reshape(1, 1, 1, -1))
    one = add.constant(np.ones((1, 1, 1, 1), np.int64))
    queries = add.unsqueeze(add.cast(positions, trt.int64), [1, 3])
    after = add.elementwise(queries, one, trt.ElementWiseOperation.SUM)
    return add.elementwise(keys, after, trt.ElementWiseOperation.LESS)


def _rotary_positions(trt: Any, network: Any) -> Any:
    """int [batch, sequence]: the tokens' positions, by which every rotary layer rotates."""
    for layer in _layers(network):
        if layer.type == trt.LayerType.ROTARY_EMBEDDING and layer.num_inputs > 3:
            return layer.get_input(3)
    raise NetworkMismatch("no rotary layer has positions, from which a mask is made")


class _Adder:
    """Adds layers to a network, returns their output, and keeps the constants alive."""

    def __init__(self, trt: Any, network: Any) -> None:
        self._trt = trt
        self._network = network
        self.constants: list[Any] = []

    def cast(self, tensor: Any, dtype: Any) -> Any:
        return tensor if tensor.dtype == dtype else self._network.add_cast(tensor, dtype).get_output(0)

    def shape(self, tensor: Any) -> Any:
        return self._network.add_shape(tensor).get_output(0)

    def slice(self, tensor: Any, start: list[int], size: list[int], stride: list[int]) -> Any:
        return self._network.add_slice(tensor, start, size, stride).get_output(0)

    def elementwise(self, left: Any, right: Any, operation: Any) -> Any:
        return self._network.add_elementwise(left, right, operation).get_output(0)

    def unsqueeze(self, tensor: Any, axes: list[int]) -> Any:
        return self._network.add_unsqueeze(tensor, self.constant(np.array(axes, np.int64))).get_output(0)

    def constant(self, array: Any) -> Any:
        self.constants.append(array)
        return self._network.add_constant(array.shape, self._trt.Weights(array)).get_output(0)


def _layers(network: Any) -> Iterator[Any]:
    return map(network.get_layer, range(network.num_layers))


def _producers(network: Any) -> dict[str, Any]:
    """The layer that makes each tensor, by the tensor's name."""
    return {layer.get_output(i).name: layer for layer in _layers(network) for i in range(layer.num_outputs)}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())
