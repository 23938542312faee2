"""onnxruntime-genai: a directory with its configuration, run by its own generator: MODEL THREADS."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.bench.serve import Unable, serve

_NEVER_SAID = 0  # padding, or an unknown token: what ends a text here, for some token has to


class Genai:
    """A model, and generators that go on."""

    packages: tuple[str, ...] = ("onnxruntime-genai", "onnxruntime")
    weight_bytes: int | None = None
    cache_bytes: int | None = None

    def __init__(self, model: str, threads: str) -> None:
        import onnxruntime_genai

        self._genai: Any = onnxruntime_genai
        decoder = {"session_options": {"intra_op_num_threads": int(threads)}}
        options = {"model": {"decoder": decoder, "eos_token_id": _NEVER_SAID}}
        config = self._genai.Config(model)
        config.overlay(json.dumps(options))
        self._model = self._genai.Model(config)
        self._generators: dict[str, Any] = {}
        self._most: int = json.loads((Path(model) / "genai_config.json").read_text())["model"]["context_length"]

    def prompt(self, state: str, prompts: NDArray[np.int32], capacity: int) -> list[int]:
        """A new generator, the old one's memory given back; a text as long as it may be has no end before.

        It keeps the end from being said until then, which would change what others say too.
        """
        whole = capacity + 1  # with the last token, which is not written
        if whole > self._most:
            raise Unable(f"{whole} tokens pass the context_length of {self._most} in its configuration")
        self._generators.pop(state, None)
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, batch_size=len(prompts), min_length=whole, max_length=whole)
        self._generators[state] = self._genai.Generator(self._model, params)
        self._generators[state].append_tokens(prompts)
        return self.step(state)

    def step(self, state: str) -> list[int]:
        """One round of its loop."""
        generator = self._generators[state]
        generator.generate_next_token()
        return [int(token) for token in generator.get_next_tokens()]


if __name__ == "__main__":
    serve(lambda: Genai(*sys.argv[1:]))
