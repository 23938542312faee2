"""OpenVINO: optimum-intel's conversion, run by OpenVINO's CPU plugin with the cache that it keeps itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.child import measured
from benchmarks.contenders.base import Contender, made, python_command, size_of, versions
from benchmarks.contenders.serve import serve
from benchmarks.peers import TORCH
from tests.support.environments import environment, run

PEER = "openvino"
# optimum-intel 2 has dropped Nemotron.
REQUIREMENTS = ("optimum-intel==1.27.0", "openvino==2026.4.1", "nncf==3.4.0", "transformers<4.58", TORCH)
PACKAGES = ("openvino", "optimum-intel", "nncf")
FLAGS = {"int8": (), "int4": ("--group-size", "128", "--ratio", "1.0")}  # all matrices at that precision
_MODEL = "openvino_model.xml"
# Weights by name with their bytes and rows, and the type of the cache that the plugin chooses on this machine.
_WEIGH = """
import json, sys, openvino
core = openvino.Core()
model = core.read_model(sys.argv[1])
found = [node for node in model.get_ops() if node.get_type_name() == "Constant"]
weights = [(node.get_friendly_name(), node.get_byte_size(), *list(node.get_output_shape(0))[:1]) for node in found]
cache = core.compile_model(model, "CPU").get_property("KV_CACHE_PRECISION")
print(json.dumps({"weights": weights, "cache_item_bytes": cache.size}))
"""


def contenders(checkpoint: Path, directory: Path, place: Path, precisions: tuple[str, ...]) -> Iterator[Contender]:
    """Convert to the models that are not there yet."""
    bin_ = environment("openvino", REQUIREMENTS, constraints=None, place=place)
    command = [bin_ / "optimum-cli", "export", "openvino", "--model", checkpoint, "--task", "text-generation-with-past"]
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    geometry = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    for precision in precisions:
        flags = ("--weight-format", precision, *FLAGS[precision])
        model = made(
            directory / f"{PEER}-{precision}",
            lambda output, flags=flags: measured([*command, *flags, output], directory),  # type: ignore[misc]
        )
        found = json.loads(run([bin_ / "python", "-c", _WEIGH, model / _MODEL]))
        yield Contender(
            PEER,
            precision,
            python_command(bin_ / "python", "openvino", model / _MODEL),
            sum(size // rows[0] if "embed_tokens" in name and rows else size for name, size, *rows in found["weights"]),
            2 * geometry * found["cache_item_bytes"],
            size_of(model),
            versions(bin_ / "python", *PACKAGES),
        )


class OpenVino:
    """A compiled model, and requests that go on; each has a cache."""

    def __init__(self, path: str) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(path)
        head = model.get_results()[0].input_value(0).get_node()
        last = openvino.opset13.gather(head.input_value(0), np.array([-1]), np.array(1))
        head.input(0).replace_source_output(last.output(0))  # as openvino-genai does: logits of a row's last token
        model.validate_nodes_and_infer_types()
        self._compiled = core.compile_model(model, "CPU")
        self._states: dict[str, tuple[Any, NDArray[np.int64], int]] = {}

    def prompt(self, state: str, prompts: NDArray[np.int32], capacity: int) -> list[int]:  # noqa: ARG002
        """A new request."""
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


if __name__ == "__main__":
    serve(lambda: OpenVino(sys.argv[1]))
