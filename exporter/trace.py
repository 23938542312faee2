"""transformers' own module, on the meta device, traced into an onnx_ir model, with an explicit KV cache or none."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from exporter.passes.clean_up import CleanUp
from exporter.rope import rope_buffers
from exporter.spec import NemotronSpec
from exporter.tasks import ANSWERS, TASKS, Task
from runtime.contract import ATTENTION_MASK, INPUT_IDS, past_names, present_names

OPSET = 23
_TEXT_GENERATION = TASKS["text-generation"]


class HeadedModel(torch.nn.Module):
    """The base model and a task's head, whose cache goes in and comes out as flat tensors.

    Its weights have one name whatever class the checkpoint was saved from: `model.…` for the base, and the head's own.
    What a head does beyond its projection (choosing the last token of a row) is a pass's matter.
    """

    def __init__(self, model: Any, task: Task, cached: bool) -> None:
        super().__init__()
        self.model = model.base_model
        self.task, self.cached = task, cached
        if task.head is not None:
            self.add_module(task.head, getattr(model, task.head))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]) -> Any:
        """What the task hands out; and, with a cache, keys and values of every layer."""
        cache = None
        if self.cached:
            cache = DynamicCache(config=self.model.config)
            for layer, (key, value) in enumerate(zip(past[::2], past[1::2], strict=True)):
                cache.update(key, value, layer)
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=self.cached
        )
        hidden = output.last_hidden_state
        if self.task.head is not None:
            hidden = getattr(self, self.task.head)(hidden)
        outputs = hidden.unbind(-1) if self.task.name == ANSWERS else (hidden,)
        if cache is None:
            return outputs
        return *outputs, [tensor for layer in cached_layers(cache) for tensor in (layer.keys, layer.values)]


def cached_layers(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers of a cache, each with `keys` and `values` [batch, kv_heads, length, head_dim]."""
    return [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]


def trace(spec: NemotronSpec, task: Task = _TEXT_GENERATION, *, cached: bool = True) -> ir.Model:
    """Trace one layer of the model that the spec describes, with a task's head; `StackLayers` makes all of it.

    No weight is in memory: the module lives on the meta device, and the weights of the returned model are initializers
    without a value. Inputs are `input_ids`, `attention_mask` and, where it is cached, a cache that grows.

    Returns:
        A model of opset 23, as torch.onnx writes it, constants folded.
    """
    model = trace_whole(replace(spec, layers=1), task, cached=cached)
    CleanUp()(model)
    return model


def trace_whole(spec: NemotronSpec, task: Task = _TEXT_GENERATION, *, cached: bool = True) -> ir.Model:
    """Trace every layer; seconds for each."""
    module = meta_module(spec, task, cached)
    batch, sequence, past = 2, 3, 5 if cached else 0
    layers = range(spec.layers if cached else 0)
    with torch.device("meta"):
        ids = torch.zeros(batch, sequence, dtype=torch.long)
        mask = torch.ones(batch, past + sequence, dtype=torch.long)
        cache = [torch.zeros(batch, spec.kv_heads, past, spec.head_dim) for _ in range(2 * len(layers))]
    rows, new, cached_tokens = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    dynamic_shapes = (
        {0: rows, 1: new},
        {0: rows, 1: torch.export.Dim.DYNAMIC},  # what it is to the others follows from its use
        [{0: rows, 2: cached_tokens}] * len(cache),
    )
    pasts, presents = ([name for layer in layers for name in names(layer)] for names in (past_names, present_names))
    with _quiet(), torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        # That cache pays where layers repeat; for one, its keys of symbolic shapes take a third of the time.
        program = torch.onnx.export(
            module.eval(),
            (ids, mask, cache),
            dynamo=True,
            optimize=False,  # it would read the weights, which are not there
            verbose=False,
            opset_version=OPSET,
            input_names=[INPUT_IDS, ATTENTION_MASK, *pasts],
            output_names=[*task.outputs, *presents],
            dynamic_shapes=dynamic_shapes,
        )
    assert program is not None
    _release_weights(program.model, {f"model.rotary_emb.{name}": held for name, held in rope_buffers(spec).items()})
    return program.model


def meta_module(spec: NemotronSpec, task: Task = _TEXT_GENERATION, cached: bool = True) -> HeadedModel:
    """The model on the meta device: names and shapes of every weight, and no memory for any."""
    config = type(spec.config).from_dict({**spec.config.to_dict(), "num_hidden_layers": spec.layers})
    config._attn_implementation = "sdpa"  # traces to one Attention node per layer
    with torch.device("meta"):
        model = task.build(config)
    module = HeadedModel(model, task, cached)
    # Frequencies stay those of the start: `exporter.rope` refuses the lengths at which they would change.
    module.model.rotary_emb.rope_type = "default"
    module.train(False)
    return module


def _release_weights(model: ir.Model, buffers: Mapping[str, torch.Tensor]) -> None:
    """Give buffers their value and take the meta tensor from weights."""
    for name, value in model.graph.initializers.items():
        if name in buffers:
            value.const_value = ir.tensor(buffers[name].numpy(), name=name)
        elif isinstance(value.const_value, ir.TensorProtocol) and _is_meta(value.const_value):
            value.const_value = None


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
