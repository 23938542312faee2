"""The model's code in a Triton played by a fake: what a real server cannot be made to show, or only slowly."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_triton import Logger, Request, Sender, TritonError, backend_utils

from exporter.triton.config import INPUTS, Serving
from exporter.triton.repository import package
from runtime import load
from runtime.errors import CheckFailed, UserError
from runtime.scheduler import Scheduler
from runtime.text_generation import TextGenerator

PROMPT = "Complete the paragraph: our solar system is"
ENDLESS = {"text_input": PROMPT, "max_tokens": 400, "temperature": 0.0, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def models(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(tiny_bundle, tmp_path_factory.mktemp("models"), Serving(slots=2), name="tiny").path


@pytest.fixture
def code(models: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The repository's model.py, imported as Triton does."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend_utils())
    spec = importlib.util.spec_from_file_location("model", models / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "model", module)
    spec.loader.exec_module(module)
    module.LOOK_S = 0.0
    return module


@pytest.fixture
def start(code: Any) -> Iterator[Callable[..., Any]]:
    """`start(slots=2, …)`: a model with these parameters in its config.pbtxt, unloaded at the end."""
    started = []

    def initialize(**parameters: object) -> Any:
        given = {name: {"string_value": str(value)} for name, value in parameters.items()}
        model = code.TritonPythonModel()
        model.initialize({"model_config": json.dumps({"parameters": given}), "model_name": "tiny"})
        started.append(model)
        return model

    yield initialize
    for model in started:
        model.finalize()


@pytest.fixture(scope="module")
def ours(tiny_bundle: Path) -> TextGenerator:
    return load(tiny_bundle, task="text-generation")


def ask(model: Any, parameters: dict[str, Any] | None = None, **inputs: Any) -> Sender:
    request = Request(inputs, parameters or {})
    assert model.execute([request]) is None
    return request.sender


def test_every_input_of_the_description_is_one_that_the_code_reads(code: Any) -> None:
    assert {name for name, _, _ in INPUTS} == {*code.PROMPTS, *code.OPTIONS}


def test_streams_join_the_batch_and_give_the_text_of_generate(start: Callable[..., Any], ours: TextGenerator) -> None:
    model = start(slots=2, max_length=128)
    prompts = [PROMPT, "The Sun is", "Mars is"]
    senders = [ask(model, text_input=text, max_tokens=24, temperature=0.0, stream=True) for text in prompts]
    for prompt, sender in zip(prompts, senders, strict=True):
        expected = ours.generate(prompt, greedy=True, max_new_tokens=24).sequences[0]
        assert sender.text() == (expected.text, expected.finish_reason)
    assert Logger.lines == [f"tiny: {ours.backend} on {ours.device}"]


def test_a_number_means_what_its_digits_say_and_not_the_float32_next_to_it(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    settings = TextGenerator.settings
    monkeypatch.setattr(TextGenerator, "settings", lambda self, given: seen.append(given) or settings(self, given))
    inputs = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "seed": 2**63, "top_k": 3}
    ask(start(), text_input="Mars", max_tokens=2, stop_words=["é", "b"], **inputs).text()
    assert seen == [{"max_new_tokens": 2, "stop": ["é", "b"], **inputs}]


def test_a_cancelled_request_is_told_so_and_leaves_its_slot(start: Callable[..., Any]) -> None:
    model = start(slots=1)
    first, waiting = ask(model, **ENDLESS), ask(model, **ENDLESS)
    assert isinstance(first.next(), dict)
    first.cancelled = waiting.cancelled = True
    for sender in (first, waiting):
        while isinstance(answer := sender.next(), dict):
            pass
        assert answer == TritonError("the request was cancelled", TritonError.CANCELLED)
    assert ask(model, text_input=PROMPT, max_tokens=2).text()[1] == "length"


@pytest.mark.parametrize(
    ("inputs", "parameters", "line"),
    [
        ({"text_input": "x", "input_ids": [5]}, {}, "give text_input or input_ids, and not both"),
        ({"input_ids": [5], "chat": True}, {}, "chat makes a prompt of text; give text_input instead of input_ids"),
        ({"text_input": b"\xff"}, {}, r"text_input is not UTF-8 (b'\xff'); send UTF-8"),
        ({"text_input": "x"}, {"max_new_tokens": 3}, "unknown input 'max_new_tokens'; known: text_input, "),
        ({"text_input": "x", "temperature": float("nan")}, {}, "temperature should be 0 (greedy) or more; found nan"),
        ({"input_ids": []}, {}, "the prompt is empty"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    start: Callable[..., Any], inputs: dict[str, Any], parameters: dict[str, Any], line: str
) -> None:
    answer = ask(start(), parameters, **inputs).next()
    assert isinstance(answer, TritonError)
    assert answer.code == TritonError.INVALID_ARG
    assert answer.text.startswith(line)


def test_headers_that_the_server_forwards_and_its_own_parameters_are_no_inputs(start: Callable[..., Any]) -> None:
    forwarded = {"x-request-id": "7", "triton_enable_empty_final_response": False}
    assert ask(start(), forwarded, text_input=PROMPT, max_tokens=1).text()[1] == "length"


def test_a_step_that_fails_ends_the_requests_that_ran_and_not_the_model(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, step, fails = start(slots=2), Scheduler.step, threading.Event()

    def failing(self: Scheduler) -> bool:
        if fails.is_set():
            fails.clear()
            raise CheckFailed("no memory\nfor the step")
        return step(self)

    monkeypatch.setattr(Scheduler, "step", failing)
    senders = [ask(model, **ENDLESS) for _ in range(2)]
    for sender in senders:
        sender.next()
    fails.set()
    for sender in senders:
        while isinstance(answer := sender.next(), dict):
            pass
        assert answer == TritonError("no memory for the step", TritonError.INTERNAL)
    assert ask(model, text_input=PROMPT, max_tokens=2).text()[1] == "length"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bug_that_ends_the_worker_leaves_nobody_waiting(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = start(slots=1)

    def broken(self: Scheduler) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr(Scheduler, "step", broken)
    for _ in range(2):  # while it ends, and afterwards
        answer = ask(model, **ENDLESS).next()
        assert answer == TritonError("the model has stopped; load it again", TritonError.UNAVAILABLE)


def test_unloading_tells_those_who_are_waiting(start: Callable[..., Any]) -> None:
    model = start(slots=1)
    senders = [ask(model, **ENDLESS) for _ in range(3)]
    model.finalize()
    for sender in senders:
        while isinstance(answer := sender.next(), dict):
            pass
        assert answer.code == TritonError.UNAVAILABLE


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"slot": 2}, "config.pbtxt: unknown parameter 'slot'; known: slots, max_length, backend, device, threads"),
        ({"slots": "many"}, "config.pbtxt: slots should be a whole number above zero; found 'many'"),
        ({"slots": 0}, "config.pbtxt: slots should be a whole number above zero; found '0'"),
        ({"backend": "vulkan"}, "unknown backend 'vulkan'"),
        ({"max_length": 4096}, "512"),
    ],
)
def test_a_wrong_parameter_is_the_reason_why_the_model_does_not_load(
    start: Callable[..., Any], parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        start(**parameters)
    assert message in str(refused.value)


def test_parameters_in_capitals_are_triton_s_own(start: Callable[..., Any]) -> None:
    start(EXECUTION_ENV_PATH="/envs/python.tar.gz")


def test_a_python_without_the_runtime_is_told_what_to_install(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "runtime", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs nemotron-export\[cpu\] or \[gpu\]"):
        code.__spec__.loader.exec_module(code)
