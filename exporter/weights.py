"""Weights go from the checkpoint into the bundle's external data one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from exporter.checkpoint import Checkpoint
from exporter.recipe import is_weight, recipe_of
from exporter.spec import NemotronSpec
from runtime.errors import UserError

ALIGNMENT = 4096  # a page, so that a runtime can map each tensor
INLINE_BYTES = 1024  # constants up to this size stay in model.onnx

_BUFFERS = ("rotary_emb.inv_freq",)  # older checkpoints store what the configuration implies
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def weight_source(name: str, checkpoint: Checkpoint) -> str:
    """The tensor that holds a weight: a tied head and embedding are stored once, under either name."""
    if checkpoint.spec.tied and name in (EMBEDDING, HEAD) and name not in checkpoint.tensors:
        return HEAD if name == EMBEDDING else EMBEDDING
    return name


def check_tensors(shapes: dict[str, tuple[int, ...]], checkpoint: Checkpoint) -> None:
    """Check that the checkpoint has every weight in its shape and no other, before any work is done.

    Raises:
        UserError: a tensor is missing, has another shape, or has no place in the model of this configuration.
    """
    for name, shape in shapes.items():
        checkpoint.require(weight_source(name, checkpoint), shape)
    placed = {*shapes, EMBEDDING, HEAD} if checkpoint.spec.tied else set(shapes)
    homeless = sorted(name for name in checkpoint.tensors if name not in placed and not name.endswith(_BUFFERS))
    if homeless:
        raise UserError(
            f"{checkpoint.tensors[homeless[0]].file}: {len(homeless)} tensors have no place in the model that "
            f"config.json describes, {homeless[0]} among them; config.json and weights are not of one model"
        )


def expected_shapes(spec: NemotronSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every weight that a causal LM of this spec has, by transformers' own module."""
    from exporter.trace import meta_module

    return {name: tuple(parameter.shape) for name, parameter in meta_module(spec).named_parameters()}


def weight_bytes(model: ir.Model) -> int:
    """Bytes that the graph's weights take."""
    weights = [value for value in model.graph.initializers.values() if is_weight(value)]
    return sum(math.prod(v.shape.numpy()) * int(v.dtype.itemsize) for v in weights if v.shape and v.dtype)


def write_weights(
    model: ir.Model, checkpoint: Checkpoint, path: Path, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Write every weight and large constant of the graph to `path` and let the graph refer to it.

    Memory is bounded by the largest tensor in fp32.

    Args:
        model: the lowered graph; its initializers are given external tensors.
        checkpoint: where the weights come from.
        path: the data file, beside which model.onnx will stand.
        progress: called with the bytes written after each tensor.

    Raises:
        UserError: a tensor is missing, misshapen, unreadable or not finite.
    """
    with path.open("wb") as file:
        for value in model.graph.initializers.values():
            assert value.name is not None
            if is_weight(value):
                value.const_value = _append(file, path, value, _load(value, checkpoint))
            elif value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
                value.const_value = _append(file, path, value, memoryview(value.const_value.tobytes()))
            else:
                continue
            progress(file.tell())


def _load(value: ir.Value, checkpoint: Checkpoint) -> memoryview:
    assert value.shape is not None
    recipe = recipe_of(value)
    source = weight_source(recipe.tensor, checkpoint)
    checkpoint.require(source, recipe.source_shape(tuple(int(dim) for dim in value.shape.numpy())))
    import torch

    assert value.dtype is not None
    dtype: torch.dtype = getattr(torch, value.dtype.name.lower())
    tensor = recipe.apply(checkpoint.read(source), dtype)
    if not torch.isfinite(tensor).all():
        raise UserError(
            f"tensor {source} leaves the range of {value.dtype.name.lower()}; export with --precision bf16 or fp32"
        )
    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


def _append(file: BinaryIO, path: Path, value: ir.Value, data: memoryview) -> ir.ExternalTensor:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    offset = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    file.seek(offset)
    file.write(data)
    return ir.ExternalTensor(
        path.name, offset, data.nbytes, value.dtype, shape=value.shape, name=value.name, base_dir=path.parent
    )
