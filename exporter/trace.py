"""transformers' own module, on the meta device, traced with an explicit KV cache into an onnx_ir model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import DynamicCache, NemotronForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding

from exporter.passes.clean_up import CleanUp
from exporter.spec import NemotronSpec
from exporter.stack import stack_layers
from runtime.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, past_names, present_names

OPSET = 23
_WRAPPER_PREFIX = "model."


class _CachedNemotron(torch.nn.Module):
    """A causal LM whose cache goes in and comes out as flat tensors."""

    def __init__(self, model: NemotronForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]) -> Any:
        cache = DynamicCache(config=self.model.config)
        for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(key, value, layer)
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        present = [tensor for layer in cached_layers(cache) for tensor in (layer.keys, layer.values)]
        return output.logits, present


def cached_layers(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers of a cache, each with `keys` and `values` [batch, kv_heads, length, head_dim]."""
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]


def trace(spec: NemotronSpec) -> ir.Model:
    """Trace the causal LM that the spec describes.

    No weight is in memory: the module lives on the meta device, and the weights of the returned model are initializers
    without a value, called as in the checkpoint. One layer is traced and repeated, so the time does not grow with the
    depth. Inputs are `input_ids`, `attention_mask` and a cache that grows.

    Returns:
        A model of opset 23, as torch.onnx writes it, constants folded.
    """
    model = trace_whole(replace(spec, layers=1))
    CleanUp()(model)
    stack_layers(model, spec.layers)
    return model


def trace_whole(spec: NemotronSpec) -> ir.Model:
    """Trace every layer; seconds for each."""
    model = meta_module(spec)
    batch, sequence, past = 2, 3, 5
    with torch.device("meta"):
        ids = torch.zeros(batch, sequence, dtype=torch.long)
        mask = torch.ones(batch, past + sequence, dtype=torch.long)
        cache = [torch.zeros(batch, spec.kv_heads, past, spec.head_dim) for _ in range(2 * spec.layers)]
    dynamic = torch.export.Dim.DYNAMIC
    names = [(past_names(layer), present_names(layer)) for layer in range(spec.layers)]
    with _quiet():
        program = torch.onnx.export(
            _CachedNemotron(model).eval(),
            (ids, mask, cache),
            dynamo=True,
            optimize=False,  # it would read the weights, which are not there
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT_IDS, ATTENTION_MASK, *(name for pasts, _ in names for name in pasts)],
            output_names=[LOGITS, *(name for _, presents in names for name in presents)],
            dynamic_shapes=(
                {0: dynamic, 1: dynamic},
                {0: dynamic, 1: dynamic},
                [{0: dynamic, 2: dynamic}] * len(cache),
            ),
        )
    assert program is not None
    _release_weights(program.model, _buffers(spec))
    return program.model


def meta_module(spec: NemotronSpec) -> NemotronForCausalLM:
    """The causal LM on the meta device: names and shapes of every weight, and no memory for any."""
    config = type(spec.config).from_dict({**spec.config.to_dict(), "num_hidden_layers": spec.layers})
    config._attn_implementation = "sdpa"  # traces to one Attention node per layer
    with torch.device("meta"):
        model = NemotronForCausalLM(config)
    model.train(False)
    return model


def rope_tables(spec: NemotronSpec, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of every position, float32 [max_length, rotary_dim/2], as transformers computes them."""
    rotary = NemotronRotaryEmbedding(spec.config)
    cos, sin = rotary(torch.zeros(1), torch.arange(max_length)[None])
    half = spec.rotary_dim // 2
    return cos[0, :, :half].numpy().copy(), sin[0, :, :half].numpy().copy()


def _buffers(spec: NemotronSpec) -> dict[str, torch.Tensor]:
    """The module's non-persistent buffers, which no checkpoint holds, with their values."""
    rotary = NemotronRotaryEmbedding(spec.config)
    return {f"model.rotary_emb.{name}": buffer for name, buffer in rotary.named_buffers()}


def _release_weights(model: ir.Model, buffers: Mapping[str, torch.Tensor]) -> None:
    """Name initializers as the checkpoint does; give buffers their value and take the meta tensor from weights."""
    for name in list(model.graph.initializers):
        value = model.graph.initializers.pop(name)
        value.name = name.removeprefix(_WRAPPER_PREFIX)
        if value.name in buffers:
            value.const_value = ir.tensor(buffers[value.name].numpy(), name=value.name)
        elif isinstance(value.const_value, ir.TensorProtocol) and _is_meta(value.const_value):
            value.const_value = None
        model.graph.initializers.add(value)


def _is_meta(tensor: ir.TensorProtocol) -> bool:
    raw = getattr(tensor, "raw", None)
    return isinstance(raw, torch.Tensor) and raw.is_meta


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says of itself while tracing: missing torchvision, its own deprecations."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)
