"""Rotary embedding tables: which types one table can express, up to which length, and the tables themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from exporter.spec import NemotronSpec

ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "longrope", "proportional", "yarn")
STRETCHED = ("linear", "llama3", "proportional", "yarn")  # by a factor, whatever the length: one table goes beyond

# Why the frequencies of a row change with its length, and why that ends what can be exported: keys that are cached
# were rotated by the old ones, so that transformers itself gives one thing in a single pass and another step by step.
_RUNNING = {
    "dynamic": "recomputes its frequencies at every length beyond max_position_embeddings",
    "longrope": "takes other frequencies for rows longer than original_max_position_embeddings",
}


def longest(spec: NemotronSpec) -> int:
    """The most positions that one table holds as transformers computes them.

    A type that is stretched by a factor goes as far as factor · original length, where that is more than
    `max_position_embeddings`. Those whose frequencies depend on the running length end where they begin to change.
    """
    rope = _parameters(spec)
    original = int(rope.get("original_max_position_embeddings") or spec.max_positions)
    if spec.rope_type in STRETCHED:
        return max(spec.max_positions, int(original * float(rope.get("factor") or 1.0)))
    return min(original, spec.max_positions) if spec.rope_type == "longrope" else spec.max_positions


def checked_length(spec: NemotronSpec, asked: int | None) -> int:
    """Tokens that a row may hold: what is asked for, or `max_position_embeddings`.

    Raises:
        UserError: more than one table can express.
    """
    limit, length = longest(spec), spec.max_positions if asked is None else asked
    if 1 <= length <= limit:
        return length
    if spec.rope_type in _RUNNING and length > limit:
        raise UserError(
            f"rope type {spec.rope_type} {_RUNNING[spec.rope_type]}, and keys in the cache keep the old ones: no "
            f"graph of {length} positions is the model; export with --max-length {limit} or less"
        )
    what = (
        "the model's max_position_embeddings" if limit == spec.max_positions else f"as far as {spec.rope_type} scales"
    )
    raise UserError(f"--max-length should be within 1..{limit}, {what}; found {length}")


def rope_tables(spec: NemotronSpec, max_length: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of every position, float32 [max_length, rotary_dim/2], as transformers computes them."""
    import torch

    cos, sin = _rotary(spec)(torch.zeros(1, device="cpu"), torch.arange(max_length, device="cpu")[None])
    half = spec.rotary_dim // 2
    return cos[0, :, :half].numpy().copy(), sin[0, :, :half].numpy().copy()


def rope_buffers(spec: NemotronSpec) -> dict[str, torch.Tensor]:
    """The rotary module's buffers by name, which no checkpoint holds."""
    return dict(_rotary(spec).named_buffers())


def check_rope(spec: NemotronSpec, origin: str) -> None:
    """Refuse parameters that transformers cannot make frequencies of, or that do not fit the width.

    Raises:
        UserError: it names the type and what transformers says.
    """
    import numpy as np

    try:
        cos, _ = rope_tables(spec, 1)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{origin}: rope type {spec.rope_type} has no frequencies with these parameters ({reason}); correct them"
        ) from error
    if cos.shape[1] * 2 != spec.rotary_dim or not np.isfinite(cos).all():
        raise UserError(
            f"{origin}: rope type {spec.rope_type} gives {cos.shape[1]} frequencies for {spec.rotary_dim} channels, "
            "or some that are not finite; correct its parameters"
        )


def _rotary(spec: NemotronSpec) -> Any:
    import torch
    from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding

    with torch.device("cpu"):  # a caller may be within another
        return NemotronRotaryEmbedding(spec.config)


def _parameters(spec: NemotronSpec) -> dict[str, Any]:
    return dict(spec.config.rope_parameters or {})
