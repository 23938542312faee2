"""`config.pbtxt`: what Triton should know of the model. Tensors have the names of its TensorRT-LLM and vLLM models'.

The file's language is protobuf's text format of `inference.ModelConfig`
(https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

CPU, GPU = "KIND_CPU", "KIND_GPU"

# Name, type and length of each tensor of a request; -1 is any length. All are optional: one of the first two is needed.
INPUTS = (
    ("text_input", "TYPE_STRING", 1),
    ("input_ids", "TYPE_INT32", -1),
    ("chat", "TYPE_BOOL", 1),
    ("stream", "TYPE_BOOL", 1),
    ("max_tokens", "TYPE_INT32", 1),
    ("temperature", "TYPE_FP32", 1),
    ("top_k", "TYPE_INT32", 1),
    ("top_p", "TYPE_FP32", 1),
    ("min_p", "TYPE_FP32", 1),
    ("repetition_penalty", "TYPE_FP32", 1),
    ("seed", "TYPE_UINT64", 1),
    ("stop_words", "TYPE_STRING", -1),
    ("ignore_eos", "TYPE_BOOL", 1),
)
OUTPUTS = (("text_output", "TYPE_STRING", 1), ("token_ids", "TYPE_INT32", -1), ("finish_reason", "TYPE_STRING", 1))


@dataclass(frozen=True)
class Serving:
    """How the bundle is run; what is None is left to the runtime.

    Attributes:
        slots: requests that run at once; others wait. None for what suits the bundle.
        max_length: tokens of each, prompt included.
        backend: of the runtime.
        device: where ONNX Runtime runs.
        threads: within an operator.
    """

    slots: int | None = None
    max_length: int | None = None
    backend: str = "auto"
    device: str | None = None
    threads: int | None = None

    @property
    def parameters(self) -> dict[str, str]:
        """What is given, as Triton has it."""
        return {name: str(value) for name, value in asdict(self).items() if value is not None}


def config_text(name: str, serving: Serving, kind: str) -> str:
    """The file's text.

    Args:
        name: of the model.
        serving: what becomes the file's `parameters`, which a user may edit.
        kind: of the one instance, CPU or GPU.
    """
    gpus = " gpus: [ 0 ]" if kind == GPU else ""
    lines = [
        "# Written by nemotron-export package. The server's Python needs nemotron-export[cpu] or [gpu], not both.",
        f"name: {json.dumps(name)}",
        'backend: "python"',
        "# Requests join one running batch, whose size is `slots` below: Triton itself batches nothing.",
        "max_batch_size: 0",
        "model_transaction_policy { decoupled: true }",
        *_tensors("input", INPUTS, " optional: true"),
        *_tensors("output", OUTPUTS, ""),
        f"instance_group [ {{ kind: {kind} count: 1{gpus} }} ]",
        *(
            f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
            for key, value in serving.parameters.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _tensors(what: str, tensors: Sequence[tuple[str, str, int]], more: str) -> list[str]:
    rows = [f'  {{ name: "{name}" data_type: {kind} dims: [ {length} ]{more} }}' for name, kind, length in tensors]
    return [f"{what} [", ",\n".join(rows), "]"]
