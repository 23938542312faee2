"""A bundle as a model of Triton's Python backend: requests join one running batch, and answer as they go.

Triton runs this file in a process of its own, whose Python needs nemotron-export[cpu] or nemotron-export[gpu].
The inputs, outputs and parameters are in config.pbtxt, two directories up.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

try:
    from runtime import load
    from runtime.errors import UserError
    from runtime.request import Request
    from runtime.row import Event
    from runtime.text_generation import Options, RunningBatch, TextGenerator
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(f"{missing}: the server's Python needs nemotron-export[cpu] or [gpu]") from missing

PARAMETERS = ("slots", "max_length", "backend", "device", "threads")
PROMPTS = ("text_input", "input_ids", "chat", "stream")
# The inputs that are options of the runtime, by its names for them.
OPTIONS = {
    "max_tokens": "max_new_tokens",
    "stop_words": "stop",
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "ignore_eos")},
}
LOOK_S = 0.1  # between two looks at who has cancelled: each asks the server's process


class TritonPythonModel:
    """What Triton makes of this file: one for each instance, called by one thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle, which replays its golden cases where it meets this machine for the first time.

        Raises:
            UserError: the bundle cannot run here, or a parameter of config.pbtxt is none. Triton shows it as the
                reason why the model is not available.
        """
        given = settings(json.loads(args["model_config"]).get("parameters", {}))
        self._model = load(
            Path(__file__).parent / "bundle",
            task="text-generation",
            backend=given.get("backend", "auto"),
            device=given.get("device"),
            threads=number(given, "threads"),
        )
        for remark in self._model.remarks:
            pb_utils.Logger.log_warn(remark)
        limits = {name: value for name in ("slots", "max_length") if (value := number(given, name)) is not None}
        self._worker = Worker(self._model.batch(**limits))
        pb_utils.Logger.log_info(f"{args['model_name']}: {self._model.backend} on {self._model.device}")

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand the requests to the running batch; a wrong one is answered at once, the others by the worker."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                prompt, options, stream = read(request, self._model)
            except UserError as error:
                refuse(sender, error, pb_utils.TritonError.INVALID_ARG)
            else:
                self._worker.submit(Answer(sender, prompt, options, stream))

    def finalize(self) -> None:
        """End the worker."""
        self._worker.stop()


def settings(parameters: Mapping[str, Any]) -> dict[str, str]:
    """The values of config.pbtxt's parameters; those in capitals are for Triton.

    Raises:
        UserError: there is no such parameter.
    """
    for name in parameters:
        if name not in PARAMETERS and not name.isupper():
            raise UserError(f"config.pbtxt: unknown parameter {name!r}; known: {', '.join(PARAMETERS)}")
    return {name: value["string_value"] for name, value in parameters.items() if name in PARAMETERS}


def number(values: Mapping[str, str], name: str) -> int | None:
    """A parameter that is a number, None where it is not given.

    Raises:
        UserError: it is no whole number above zero.
    """
    value = values.get(name)
    if value is not None and not (value.isdecimal() and int(value)):
        raise UserError(f"config.pbtxt: {name} should be a whole number above zero; found {value!r}")
    return None if value is None else int(value)


def read(request: Any, model: TextGenerator) -> tuple[Sequence[int], Options, bool]:
    """A request's prompt as token ids, its options, and whether its answer comes in pieces.

    Raises:
        UserError: the prompt is none, or there is something that nobody would look at.
    """
    # What the generate endpoint gets beside the inputs arrives as parameters. Forwarded headers do too: they are
    # spelled with dashes.
    for name in json.loads(request.parameters() or "{}"):
        if name.isidentifier() and not name.startswith("triton_"):
            raise UserError(f"unknown input {name!r}; known: {', '.join([*PROMPTS, *OPTIONS])}")
    given = {tensor.name(): values(tensor) for tensor in request.inputs()}
    prompts = [name for name in ("text_input", "input_ids") if name in given]
    if len(prompts) != 1:
        raise UserError("give text_input or input_ids, and not both")
    chat = given.get("chat", [False])[0]
    if chat and "input_ids" in given:
        raise UserError("chat makes a prompt of text; give text_input instead of input_ids")
    prompt: Sequence[int] = given[prompts[0]]
    if chat:
        prompt = model.encode_chat([{"role": "user", "content": given["text_input"][0]}])
    elif "text_input" in given:
        prompt = model.encode(given["text_input"][0])
    options: Any = {
        option: given[name] if name == "stop_words" else given[name][0]
        for name, option in OPTIONS.items()
        if name in given
    }
    return prompt, options, bool(given.get("stream", [False])[0])


def values(tensor: Any) -> list[Any]:
    """What a tensor holds, as Python's own.

    Raises:
        UserError: bytes that are no text.
    """
    array = tensor.as_numpy().reshape(-1)
    if array.dtype == np.float32:
        return [float(str(value)) for value in array]  # 0.7 means 0.7, not the float32 next to it
    if array.dtype != np.object_:
        return list(array.tolist())
    try:
        return [value.decode("utf-8") for value in array]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{tensor.name()} is not UTF-8 ({error.object[error.start : error.end]!a}); send UTF-8"
        ) from error


@dataclass(eq=False)
class Answer:
    """A request and what it has been told: called with each event of its row."""

    sender: Any
    prompt: Sequence[int]
    options: Options
    stream: bool
    request: Request | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        """Send the text so far: at the end, or where it comes in pieces as soon as there is some."""
        self.text += event.text
        self.token_ids.append(event.token_id)
        if event.finish_reason is None and not (self.stream and self.text):
            return
        outputs = [
            pb_utils.Tensor("text_output", np.array([self.text.encode()], np.object_)),
            pb_utils.Tensor("token_ids", np.array(self.token_ids, np.int32)),
            pb_utils.Tensor("finish_reason", np.array([(event.finish_reason or "").encode()], np.object_)),
        ]
        self.text, self.token_ids = "", []
        last = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if event.finish_reason else 0
        self.sender.send(pb_utils.InferenceResponse(output_tensors=outputs), flags=last)


class Worker:
    """The thread that the running batch is for."""

    def __init__(self, batch: RunningBatch) -> None:
        self._batch = batch
        self._answers: list[Answer] = []
        self._looked = 0.0
        self._inbox: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._lock = threading.Lock()  # nothing is put into the inbox after its last look
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="batch", daemon=True)
        self._thread.start()

    def submit(self, answer: Answer) -> None:
        """Let a request join."""
        with self._lock:
            if not self._ended:
                self._inbox.put(answer)
                return
        self._turn_away(answer)

    def stop(self) -> None:
        """End the thread; requests that have not ended are told so."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._admit():
                self._step()
        finally:  # also where a bug has ended it, whose traceback is in the server's log: nobody waits for ever
            with self._lock:
                self._ended = True
            while not self._inbox.empty():
                if (answer := self._inbox.get()) is not None:
                    self._answers.append(answer)
            for answer in self._answers:
                self._turn_away(answer)

    def _turn_away(self, answer: Answer) -> None:
        refuse(answer.sender, "the model has stopped; load it again", pb_utils.TritonError.UNAVAILABLE)

    def _admit(self) -> bool:
        """Take in who has come, waiting where nobody is here; False where the end has come."""
        while not self._answers or not self._inbox.empty():
            answer = self._inbox.get()
            if answer is None:
                return False
            try:
                answer.request = self._batch.submit(answer.prompt, answer, **answer.options)
            except UserError as error:
                why = str(error).replace("max_new_tokens", "max_tokens")  # as the input is called
                refuse(answer.sender, why, pb_utils.TritonError.INVALID_ARG)
            else:
                self._answers.append(answer)
        return True

    def _step(self) -> None:
        """Run all of them a step further, and let go who has ended, failed or left."""
        failure = None
        try:
            self._batch.step()
        except UserError as error:
            failure = error
        for answer in self._answers:
            if answer.request and answer.request.failure is not None:
                refuse(answer.sender, answer.request.failure, pb_utils.TritonError.INTERNAL)
        self._answers = [answer for answer in self._answers if answer.request and not answer.request.finished]
        if failure is not None:
            self._drop(self._answers, failure, pb_utils.TritonError.INTERNAL)
        if time.monotonic() - self._looked >= LOOK_S:
            gone = [answer for answer in self._answers if answer.sender.is_cancelled()]
            self._drop(gone, "the request was cancelled", pb_utils.TritonError.CANCELLED)
            self._looked = time.monotonic()

    def _drop(self, answers: Sequence[Answer], why: object, code: int) -> None:
        """Tell requests why they end here, and free their slots."""
        self._answers = [answer for answer in self._answers if answer not in answers]
        for answer in answers:
            assert answer.request is not None
            answer.request.close()
            refuse(answer.sender, why, code)


def refuse(sender: Any, why: object, code: int) -> None:
    """Answer with an error, in one line; nothing follows it."""
    line = " ".join(str(why).split())
    response = pb_utils.InferenceResponse(error=pb_utils.TritonError(line, code))
    try:
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
    except pb_utils.TritonModelException as error:
        pb_utils.Logger.log_warn(f"nobody could be told that {line}: {error}")
