"""Whether the parity gate can hold the whole model."""

from __future__ import annotations

from exporter.checkpoint import Checkpoint
from exporter.cost import whole_gate_bytes
from exporter.memory import available_memory, size
from runtime.errors import UserError


def fits_whole(checkpoint: Checkpoint, memory: int | None) -> bool:
    """Whether it can, within so many bytes in all (default: what is available)."""
    return whole_gate_bytes(checkpoint.parameters) <= _given(memory)


def refusal(checkpoint: Checkpoint, memory: int | None) -> UserError:
    """Why a graph is not checked whose model does not fit and which cannot be compared layer by layer."""
    needed = size(whole_gate_bytes(checkpoint.parameters))
    return UserError(
        "the parity gate goes layer by layer through graphs with a cache alone; of others, and of those with hidden "
        f"states or positions, it holds the whole model: {needed} of memory, and "
        f"{size(_given(memory))} are there; export with --no-verify, and verify on a larger machine"
    )


def _given(memory: int | None) -> int:
    return available_memory() if memory is None else memory
