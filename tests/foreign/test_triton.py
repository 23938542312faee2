"""A bundle's model repository in a real Triton Inference Server, asked through its own client and over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from environments import run
from triton_server import Server, serving, triton_environment

from exporter.triton.config import INPUTS, OUTPUTS, Serving, config_text
from exporter.triton.repository import package
from runtime import load
from runtime.text_generation import TextGenerator

pytestmark = pytest.mark.foreign
PROMPT = "Complete the paragraph: our solar system is"
MODEL = "v2/models/tiny"

# Sends requests at once over one gRPC stream; prints each one's responses, and the order in which they came.
# Requests with "cancelled" are taken back when the first piece of any of them has come.
ASK = """
import json, queue, sys
import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import triton_to_np_dtype

TYPES = {"stream": "BOOL", "chat": "BOOL", "ignore_eos": "BOOL", "text_input": "BYTES", "stop_words": "BYTES",
         "max_tokens": "INT32", "input_ids": "INT32", "top_k": "INT32", "seed": "UINT64"}

def inputs(request):
    for name, value in request.items():
        kind = TYPES.get(name, "FP32")
        array = np.array(value if isinstance(value, list) else [value], triton_to_np_dtype(kind))
        tensor = triton.InferInput(name, array.shape, kind)
        tensor.set_data_from_numpy(array)
        yield tensor

requests = json.loads(sys.argv[2])
came, told, order = queue.Queue(), [[] for _ in requests], []
with triton.InferenceServerClient(sys.argv[1]) as client:
    client.start_stream(lambda result, error: came.put((result, error)))
    left = [request.pop("cancelled", False) for request in requests]
    for number, request in enumerate(requests):
        client.async_stream_infer("tiny", list(inputs(request)), request_id=str(number))
    done = 0
    while done < len(requests):
        result, error = came.get(timeout=60)
        if error is not None:
            assert len(requests) == 1, error
            told[0].append({"error": error.message()})
            break
        number = int(result.get_response().id)
        piece = {name: result.as_numpy(name) for name in ("text_output", "token_ids", "finish_reason")}
        told[number].append({
            "text": piece["text_output"][0].decode(),
            "token_ids": piece["token_ids"].tolist(),
            "finish_reason": piece["finish_reason"][0].decode(),
        })
        order.append(number)
        if all(left):
            break
        done += bool(piece["finish_reason"][0])
    client.stop_stream(cancel_requests=any(left))
print(json.dumps({"told": told, "order": order}))
"""


@pytest.fixture(scope="module")
def bin_(wheel: Path) -> Path:
    return triton_environment(wheel)


@pytest.fixture(scope="module")
def server(bin_: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("triton")
    package(tiny_bundle, place / "models", Serving(slots=2), name="tiny")
    with serving(bin_, place / "models", place) as running:
        yield running


@pytest.fixture(scope="module")
def ours(tiny_bundle: Path) -> TextGenerator:
    return load(tiny_bundle, task="text-generation")


def ask(server: Server, *requests: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run([server.python, "-c", ASK, server.grpc, json.dumps(requests)], timeout=120))
    return answer


def post(server: Server, endpoint: str = "generate", **request: Any) -> tuple[int, Any]:
    status, body = server.post(f"{MODEL}/{endpoint}", json.dumps(request).encode())
    return status, json.loads(body)


def test_the_description_is_one_that_triton_reads(bin_: Path) -> None:
    script = """
import sys
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2
print(json_format.MessageToJson(text_format.Parse(sys.argv[1], model_config_pb2.ModelConfig())))
"""
    serving = Serving(slots=3, max_length=64, device="cuda", threads=2)
    config = json.loads(run([bin_ / "python", "-c", script, config_text("a.model-1", serving, "KIND_GPU")]))
    assert (config["name"], config["backend"]) == ("a.model-1", "python")
    assert config["modelTransactionPolicy"] == {"decoupled": True}
    assert config["instanceGroup"] == [{"kind": "KIND_GPU", "count": 1, "gpus": [0]}]
    assert [(tensor["name"], tensor["dataType"], int(tensor["dims"][0])) for tensor in config["input"]] == [*INPUTS]
    assert all(tensor["optional"] for tensor in config["input"])
    assert [tensor["name"] for tensor in config["output"]] == [name for name, _, _ in OUTPUTS]
    given = {name: value["stringValue"] for name, value in config["parameters"].items()}
    assert given == {"slots": "3", "max_length": "64", "backend": "auto", "device": "cuda", "threads": "2"}


def test_a_request_over_http_has_the_text_that_generate_gives(server: Server, ours: TextGenerator) -> None:
    expected = ours.generate(PROMPT, greedy=True, max_new_tokens=48).sequences[0]
    status, answer = post(server, text_input=PROMPT, temperature=0, max_tokens=48)
    assert status == 200
    assert (answer["text_output"], answer["token_ids"]) == (expected.text, expected.token_ids)
    assert answer["finish_reason"] == expected.finish_reason


def test_the_same_seed_draws_the_same_text_as_generate(server: Server, ours: TextGenerator) -> None:
    options: dict[str, Any] = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "seed": 5}
    expected = ours.generate(PROMPT, max_new_tokens=48, repetition_penalty=1.1, **options).sequences[0]
    _, answer = post(server, text_input=PROMPT, max_tokens=48, repetition_penalty=1.1, **options)
    assert answer["text_output"] == expected.text
    assert expected.text != ours.generate(PROMPT, max_new_tokens=48, greedy=True).sequences[0].text


def test_a_conversation_a_stop_word_and_token_ids_do_what_generate_does(server: Server, ours: TextGenerator) -> None:
    chat = ours.encode_chat([{"role": "user", "content": "What is a moon?"}])
    expected = ours.generate(chat, greedy=True, max_new_tokens=24).sequences[0]
    for prompt in ({"text_input": "What is a moon?", "chat": True}, {"input_ids": list(chat)}):
        assert post(server, temperature=0, max_tokens=24, **prompt)[1]["text_output"] == expected.text
    stop = expected.text.split()[3]
    _, stopped = post(server, input_ids=list(chat), temperature=0, max_tokens=24, stop_words=[stop])
    assert stopped["finish_reason"] == "stop"
    assert expected.text.startswith(stopped["text_output"])
    assert stop not in stopped["text_output"]


def test_concurrent_streams_share_the_batch_and_their_pieces_join_to_the_text(
    server: Server, ours: TextGenerator
) -> None:
    prompts = [PROMPT, "The Sun is", "Mars is"]  # one more than there are slots: it waits, and joins when one is free
    answer = ask(
        server, *({"text_input": text, "max_tokens": 32, "temperature": 0.0, "stream": True} for text in prompts)
    )
    for prompt, told in zip(prompts, answer["told"], strict=True):
        expected = ours.generate(prompt, greedy=True, max_new_tokens=32).sequences[0]
        assert "".join(piece["text"] for piece in told) == expected.text
        assert [token for piece in told for token in piece["token_ids"]] == expected.token_ids
        assert [piece["finish_reason"] for piece in told] == [""] * (len(told) - 1) + [expected.finish_reason]
        assert len(told) > 8
    turns = sum(one != other for one, other in zip(answer["order"], answer["order"][1:], strict=False))
    assert turns > 16  # two of them ran at once


def test_without_stream_there_is_one_answer(server: Server) -> None:
    (told,) = ask(server, {"text_input": PROMPT, "max_tokens": 16, "temperature": 0.0})["told"]
    assert [piece["finish_reason"] for piece in told] == ["length"]
    assert len(told[0]["token_ids"]) == 16


def test_who_takes_requests_back_leaves_the_slots_to_others(server: Server) -> None:
    endless = {"text_input": "The Sun is", "max_tokens": 500, "temperature": 0.0, "ignore_eos": True, "stream": True}
    started = time.perf_counter()
    told = ask(server, endless, endless)["told"]
    one_round = time.perf_counter() - started
    assert [sum(len(piece["token_ids"]) for piece in pieces) for pieces in told] == [500, 500]

    told = ask(server, *[{**endless, "cancelled": True}] * 40)["told"]
    assert sum(map(bool, told)) <= 2  # those that had a slot; the others waited
    started = time.perf_counter()
    assert post(server, text_input=PROMPT, temperature=0, max_tokens=4)[0] == 200
    assert time.perf_counter() - started < one_round  # and not the twenty rounds that they would have taken


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ({"text_input": "moon " * 600}, "tokens, the capacity is 512; shorten it"),
        ({"text_input": "x", "max_tokens": 0}, "max_tokens should be at least 1; found 0"),
        ({"text_input": "x", "top_p": 2.0}, "top_p should be above 0 and at most 1 (all tokens); found 2.0"),
        ({"text_input": ""}, "a prompt is empty; give some text"),
        ({"input_ids": [5, 99999]}, "token id 99999 is outside the vocabulary of 2048"),
        ({"max_tokens": 3}, "give text_input or input_ids, and not both"),
    ],
)
def test_a_wrong_request_is_told_why_in_one_line_and_the_model_goes_on(
    server: Server, request_: dict[str, Any], line: str
) -> None:
    status, answer = post(server, **request_)
    assert status == 400
    assert line in answer["error"]
    assert "\n" not in answer["error"]
    assert line in ask(server, request_)["told"][0][0]["error"]
    assert post(server, text_input=PROMPT, max_tokens=1)[0] == 200


def test_an_input_that_nobody_knows_is_not_ignored(server: Server) -> None:
    status, answer = post(server, text_input=PROMPT, max_new_tokens=3)
    assert status == 400
    assert answer["error"].startswith("unknown input 'max_new_tokens'; known: text_input, input_ids, chat, stream")
