"""The model's parameters by name: where a checkpoint has each, whether all are there, and what they are for."""

from __future__ import annotations

from collections.abc import Container, Mapping

from exporter.checkpoint import Checkpoint
from exporter.spec import NemotronSpec
from exporter.tasks import ARCHITECTURES, Task
from exporter.tensor_files import TensorInfo
from runtime.errors import UserError

_BUFFERS = ("rotary_emb.inv_freq",)  # older checkpoints store what the configuration implies
BASE = "model."  # what names of the base model's weights begin with here
EMBEDDING, HEAD = f"{BASE}embed_tokens.weight", "lm_head.weight"
LAYERS = f"{BASE}layers."
FINAL_NORM = f"{BASE}norm.weight"
# What they begin with in checkpoints: of a model with a head, of question answering, of the base model itself.
_PREFIXES = (BASE, "transformer.", "")
_PARTS = ("embed_tokens", "layers", "norm")  # of the base model


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


def layer_prefix(layer: int) -> str:
    """What the names of a layer's weights begin with."""
    return f"{LAYERS}{layer}."


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


def shapes_in(tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Names, as the model has them, and shapes of the weights that a checkpoint's headers list; loads no torch."""
    prefix, shapes = _prefix(tensors), {}
    for stored, info in tensors.items():
        inner = stored.removeprefix(prefix)
        based = stored.startswith(prefix) and inner.partition(".")[0] in _PARTS
        if not stored.endswith(_BUFFERS):
            shapes[f"{BASE}{inner}" if based else stored] = info.shape
    return shapes


def _stored_as(name: str, checkpoint: Checkpoint) -> str:
    if not name.startswith(BASE):
        return name
    inner = name.removeprefix(BASE)
    return f"{_prefix(checkpoint.tensors)}{inner}"


def _prefix(tensors: Container[str]) -> str:
    anchor = "norm.bias"  # in every checkpoint, under one prefix
    return next((known for known in _PREFIXES if f"{known}{anchor}" in tensors), BASE)
