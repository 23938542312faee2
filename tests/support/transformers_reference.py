"""What transformers says of a checkpoint, in fp32: the oracle for runtimes that are not ours."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


@cache
def _model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32", attn_implementation="eager")


def reference_tokens(
    checkpoint: Path, rows: Sequence[Sequence[int]], *, seed: int = 0, **options: Any
) -> list[list[int]]:
    """New tokens of rows of one length, by `generate` with these options after torch is seeded."""
    import torch

    ids = torch.tensor(rows)
    torch.manual_seed(seed)
    tokens: list[list[int]] = _model(checkpoint).generate(ids, **options)[:, ids.shape[1] :].tolist()
    return tokens


def reference_logits(checkpoint: Path, row: Sequence[int]) -> Any:
    """float32 logits [sequence, vocab] of a row as a numpy array."""
    import torch

    with torch.no_grad():
        return _model(checkpoint)(torch.tensor([row])).logits[0].numpy()
