"""Triton's Python backend, in this process: of `triton_python_backend_utils`, what a model of ours uses.

As the python_backend's README has it; the same model runs in a real server in tests/foreign/test_triton.py.
"""

from __future__ import annotations

import json
import queue
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

FINAL = 1


class TritonModelException(Exception):
    """What its functions raise."""


@dataclass(frozen=True)
class TritonError:
    text: str
    code: int

    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = 1, 3, 4, 7


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.dtype in (np.object_, np.int32, np.uint64, np.float32, np.bool_)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


@dataclass(frozen=True)
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


class Sender:
    """A request's way back; `next()` waits for what came."""

    def __init__(self) -> None:
        self.came: queue.Queue[InferenceResponse] = queue.Queue()
        self.cancelled = self.closed = False

    def send(self, response: InferenceResponse, flags: int = 0) -> None:
        if self.closed:
            raise TritonModelException("the response sender has been closed")
        self.closed = flags == FINAL
        self.came.put(response)

    def is_cancelled(self) -> bool:
        return self.cancelled

    def next(self) -> dict[str, Any] | TritonError:
        response = self.came.get(timeout=60)
        return response.error or {t.name(): t.as_numpy().tolist() for t in response.output_tensors}

    def text(self) -> tuple[str, str]:
        """All of the text, and why it ended."""
        text = ""
        while isinstance(piece := self.next(), dict):
            text += piece["text_output"][0].decode()
            if piece["finish_reason"][0]:
                return text, piece["finish_reason"][0].decode()
        raise AssertionError(piece)


KINDS = {"stream": bool, "chat": bool, "ignore_eos": bool, "max_tokens": np.int32, "input_ids": np.int32,
         "top_k": np.int32, "seed": np.uint64, "text_input": np.object_, "stop_words": np.object_}  # fmt: skip


class Request:
    def __init__(self, inputs: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        self._inputs, self._parameters, self.sender = inputs, parameters, Sender()

    def inputs(self) -> list[Tensor]:
        tensors = []
        for name, value in self._inputs.items():
            many = [v.encode() if isinstance(v, str) else v for v in (value if isinstance(value, list) else [value])]
            tensors.append(Tensor(name, np.array(many, KINDS.get(name, np.float32))))
        return tensors

    def parameters(self) -> str:
        return json.dumps(self._parameters) if self._parameters else ""

    def get_response_sender(self) -> Sender:
        return self.sender


class Logger:
    lines: list[str]

    @classmethod
    def log_info(cls, line: str) -> None:
        cls.lines.append(line)

    log_warn = log_info


def backend_utils() -> ModuleType:
    """The module that a model imports."""
    module = ModuleType("triton_python_backend_utils")
    Logger.lines = []
    for name, value in {
        "TRITONSERVER_RESPONSE_COMPLETE_FINAL": FINAL,
        "InferenceResponse": InferenceResponse,
        "Logger": Logger,
        "Tensor": Tensor,
        "TritonError": TritonError,
        "TritonModelException": TritonModelException,
    }.items():
        setattr(module, name, value)
    return module
