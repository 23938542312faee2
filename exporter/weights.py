"""Weights go from the checkpoint into the bundle's external data one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporter.checkpoint import Checkpoint
from exporter.origin import Origin, Part, is_weight, origin_of, part_of
from exporter.rounding import SCALES
from exporter.spec import NemotronSpec
from exporter.tasks import ARCHITECTURES, Task
from runtime.errors import UserError

ALIGNMENT = 4096  # a page, so that a runtime can map each tensor
INLINE_BYTES = 1024  # constants up to this size stay in model.onnx

_BUFFERS = ("rotary_emb.inv_freq",)  # older checkpoints store what the configuration implies
BASE = "model."  # what names of the base model's weights begin with here
EMBEDDING, HEAD = f"{BASE}embed_tokens.weight", "lm_head.weight"
LAYERS = f"{BASE}layers."
# What they begin with in checkpoints: of a model with a head, of question answering, of the base model itself.
_PREFIXES = (BASE, "transformer.", "")


def weight_source(name: str, checkpoint: Checkpoint) -> str:
    """The checkpoint's tensor that holds a weight.

    The base model's prefix is that of the class which was saved; a tied head and embedding are stored once, under
    either name.
    """
    stored = _stored_as(name, checkpoint)
    if checkpoint.spec.tied and name in (EMBEDDING, HEAD) and stored not in checkpoint.tensors:
        return _stored_as(HEAD if name == EMBEDDING else EMBEDDING, checkpoint)
    return stored


def role_of(tensor: str, *, lookup: bool) -> str:
    """The name of a matrix by what is done with it: tied, the embedding and the head are stored under either name."""
    if tensor not in {EMBEDDING, HEAD}:
        return tensor
    return EMBEDDING if lookup else HEAD


def is_matrix(tensor: str) -> bool:
    """Whether a weight is a matrix that can be rounded: of the embedding, the vocabulary's head or a layer."""
    return tensor in {EMBEDDING, HEAD} or (tensor.startswith(LAYERS) and tensor.endswith("_proj.weight"))


def check_tensors(shapes: dict[str, tuple[int, ...]], checkpoint: Checkpoint, task: Task) -> None:
    """Check that the checkpoint has every weight in its shape and no other, before any work is done.

    Args:
        shapes: of every weight of the task's model, by `expected_shapes`.
        checkpoint: what is exported; the weights of its own head may be left over where the task has another.
        task: what it is exported for.

    Raises:
        UserError: a tensor is missing, has another shape, or has no place in the model of this configuration.
    """
    own = ARCHITECTURES[checkpoint.spec.architecture]
    for name, shape in shapes.items():
        source = weight_source(name, checkpoint)
        if source not in checkpoint.tensors and own is not task and name.startswith(f"{task.head}."):
            raise UserError(
                f"{checkpoint.path} has no {name}, the head of {task.name}: it was saved from {own.architecture}; "
                f"export it with --task {own.name}, or give a checkpoint of {task.architecture}"
            )
        checkpoint.require(source, shape)
    placed = {weight_source(name, checkpoint) for name in shapes}
    if checkpoint.spec.tied:
        placed |= {_stored_as(EMBEDDING, checkpoint), HEAD}
    left_over = f"{own.head}." if own.head is not None and own is not task else None
    homeless = sorted(
        name
        for name in checkpoint.tensors
        if name not in placed and not name.endswith(_BUFFERS) and not (left_over and name.startswith(left_over))
    )
    if homeless:
        raise UserError(
            f"{checkpoint.tensors[homeless[0]].file}: {len(homeless)} tensors have no place in the model that "
            f"config.json describes, {homeless[0]} among them; config.json and weights are not of one model"
        )


def expected_shapes(spec: NemotronSpec, task: Task) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every weight of the task's model of this spec, by transformers' own module."""
    from exporter.trace import meta_module

    return {name: tuple(parameter.shape) for name, parameter in meta_module(spec, task).named_parameters()}


def _stored_as(name: str, checkpoint: Checkpoint) -> str:
    if not name.startswith(BASE):
        return name
    inner = name.removeprefix(BASE)
    anchor = "norm.bias"  # in every checkpoint, under one prefix
    prefix = next((known for known in _PREFIXES if f"{known}{anchor}" in checkpoint.tensors), BASE)
    return f"{prefix}{inner}"


def write_embeddings(checkpoint: Checkpoint, path: Path) -> None:
    """Write the embedding of every token, float32 [vocab, hidden], for graphs whose input is embeddings."""
    import numpy as np

    np.save(path, checkpoint.read(weight_source(EMBEDDING, checkpoint)).float().numpy(), allow_pickle=False)


def weight_bytes(model: ir.Model) -> int:
    """Bytes that the graph's weights take."""
    weights = [value for value in model.graph.initializers.values() if is_weight(value)]
    return sum(math.prod(v.shape.numpy()) * v.dtype.bitwidth // 8 for v in weights if v.shape and v.dtype)


def write_weights(
    model: ir.Model, checkpoint: Checkpoint, path: Path, progress: Callable[[int], None] = lambda _: None
) -> None:
    """Write every weight and large constant of the graph to `path` and let the graph refer to it.

    Memory is bounded by the largest tensor in fp32. The parts of a rounded matrix stand side by side among the
    initializers, so that it is read and rounded once.

    Args:
        model: the lowered graph; its initializers are given external tensors.
        checkpoint: where the weights come from.
        path: the data file, beside which model.onnx will stand.
        progress: called with the bytes written after each tensor.

    Raises:
        UserError: a tensor is missing, misshapen, unreadable or not finite.
    """
    reader = _Reader(checkpoint)
    with path.open("wb") as file:
        for value in model.graph.initializers.values():
            assert value.name is not None
            if is_weight(value):
                value.const_value = _append(file, path, value, reader.content(value))
            elif value.const_value is not None and value.const_value.nbytes > INLINE_BYTES:
                value.const_value = _append(file, path, value, memoryview(value.const_value.tobytes()))
            else:
                continue
            progress(file.tell())


class _Reader:
    """Reads what initializers hold; of the matrix that was rounded last, all parts are kept."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._rounded: tuple[Part, dict[str, NDArray[Any]]] | None = None

    def content(self, value: ir.Value) -> memoryview:
        """The bytes of an initializer.

        Raises:
            UserError: its tensor is missing, misshapen, unreadable, or leaves the initializer's range.
        """
        part = part_of(value)
        return self._whole(value) if part is None else self._part(value, part)

    def _whole(self, value: ir.Value) -> memoryview:
        assert value.shape is not None
        assert value.dtype is not None
        origin = origin_of(value)
        source = self._source(origin, origin.source_shape(tuple(int(dim) for dim in value.shape.numpy())))
        import torch

        dtype: torch.dtype = getattr(torch, value.dtype.name.lower())
        tensor = origin.apply(self._checkpoint.read(source), dtype)
        self._check(bool(torch.isfinite(tensor).all()), source, value.dtype)
        return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)

    def _part(self, value: ir.Value, part: Part) -> memoryview:
        assert value.dtype is not None
        if self._rounded is None or replace(self._rounded[0], name=part.name) != part:
            source = weight_source(part.matrix.tensor, self._checkpoint)
            self._rounded = part, part.rounding.apply(self._checkpoint.read(source))
        array = self._rounded[1][part.name]
        if part.name == SCALES:
            array = array.astype(value.dtype.numpy())
            self._check(bool(np.isfinite(array.astype(np.float32)).all()), part.matrix.tensor, value.dtype)
        return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def _source(self, origin: Origin, shape: tuple[int, ...]) -> str:
        source = weight_source(origin.tensor, self._checkpoint)
        self._checkpoint.require(source, shape)
        return source

    @staticmethod
    def _check(finite: bool, source: str, dtype: ir.DataType) -> None:
        if not finite:
            raise UserError(
                f"tensor {source} leaves the range of {dtype.name.lower()}; export with --precision bf16 or fp32"
            )


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
