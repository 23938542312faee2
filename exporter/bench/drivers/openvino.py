"""OpenVINO's CPU plugin with the cache that it keeps itself, on a model that optimum-intel wrote: DIRECTORY THREADS."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporter.bench.serve import serve


class OpenVino:
    """A compiled model, and requests that go on; each has a cache."""

    packages: tuple[str, ...] = ("openvino",)

    def __init__(self, directory: str, threads: str) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(Path(directory) / "openvino_model.xml")
        self.weight_bytes: int | None = _read(model)
        head = model.get_results()[0].input_value(0).get_node()
        last = openvino.opset13.gather(head.input_value(0), np.array([-1]), np.array(1))
        head.input(0).replace_source_output(last.output(0))  # as openvino-genai does: logits of a row's last token
        model.validate_nodes_and_infer_types()
        self._compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": int(threads)})
        self._states: dict[str, tuple[Any, NDArray[np.int64], int]] = {}
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
        items = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
        self.cache_bytes: int | None = items * self._compiled.get_property("KV_CACHE_PRECISION").size

    def prompt(self, state: str, prompts: NDArray[np.int32], capacity: int) -> list[int]:  # noqa: ARG002
        """A new request, the old one's memory given back."""
        self._states.pop(state, None)
        return self._infer(state, self._compiled.create_infer_request(), prompts.astype(np.int64), 0)

    def step(self, state: str) -> list[int]:
        """One token more in every row."""
        return self._infer(state, *self._states[state])

    def _infer(self, state: str, request: Any, tokens: NDArray[np.int64], past: int) -> list[int]:
        rows, length = tokens.shape
        mask = np.ones((rows, past + length), np.int64)
        request.infer({"input_ids": tokens, "attention_mask": mask, "beam_idx": np.arange(rows, dtype=np.int32)})
        chosen = request.get_output_tensor(0).data[:, -1].argmax(-1)
        self._states[state] = request, chosen[:, None], past + length
        return [int(token) for token in chosen]


def _read(model: Any) -> int:
    """Bytes of all constants, but of the embedding a row."""
    total = 0
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            rows = list(node.get_output_shape(0))[:1]
            table = "embed_tokens" in node.get_friendly_name() and rows
            total += node.get_byte_size() // rows[0] if table else node.get_byte_size()
    return total


if __name__ == "__main__":
    serve(lambda: OpenVino(*sys.argv[1:]))
