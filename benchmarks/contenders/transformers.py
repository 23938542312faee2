"""transformers on torch, what every other is compared with: the model as its checkpoint is, in a cache that grows."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.contenders.base import Contender, python_command, size_of, versions
from benchmarks.contenders.serve import serve
from benchmarks.make_checkpoint import EMBEDDING

PEER = "transformers"
PACKAGES = ("transformers", "torch")
_DTYPES = {"fp32": ("float32", 4), "bf16": ("bfloat16", 2)}


def contenders(checkpoint: Path, precisions: tuple[str, ...]) -> Iterator[Contender]:
    """In the project's own environment."""
    from exporter.parameters import expected_shapes
    from exporter.spec import read_spec
    from exporter.tasks import GENERATION, TASKS

    spec = read_spec(checkpoint)
    shapes = expected_shapes(spec, TASKS[GENERATION])
    read = sum(prod(shape[1:] if name == EMBEDDING else shape) for name, shape in shapes.items())
    for precision in precisions:
        dtype, size = _DTYPES[precision]
        yield Contender(
            PEER,
            precision,
            python_command(sys.executable, "transformers", checkpoint, dtype),
            read * size,
            2 * spec.layers * spec.kv_heads * spec.head_dim * size,
            size_of(checkpoint),
            versions(sys.executable, *PACKAGES),
        )


class Transformers:
    """A model, and caches with the tokens that they go on from."""

    def __init__(self, checkpoint: str, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_grad_enabled(False)
        self._torch, self._cache = torch, DynamicCache
        self._model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        self._states: dict[str, tuple[Any, Any]] = {}

    def prompt(self, state: str, prompts: NDArray[np.int32], capacity: int) -> list[int]:  # noqa: ARG002
        """A new cache."""
        return self._forward(state, self._torch.from_numpy(prompts).long(), self._cache(config=self._model.config))

    def step(self, state: str) -> list[int]:
        """One token more in every row."""
        return self._forward(state, *self._states[state])

    def _forward(self, state: str, tokens: Any, cache: Any) -> list[int]:
        logits = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        chosen = logits.argmax(-1)
        self._states[state] = chosen[:, None], cache
        return [int(token) for token in chosen]


if __name__ == "__main__":
    serve(lambda: Transformers(*sys.argv[1:]))
