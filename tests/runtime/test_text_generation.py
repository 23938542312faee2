"""A bundle from `load` to text; the oracle is transformers' own `generate`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from corruptions import redescribe

from runtime import load
from runtime.errors import UserError
from runtime.text_generation import TextGenerator

PROMPTS = ["Our solar", "Mars is red with rust. Jupiter", "日"]


@pytest.fixture
def model(bundle_dir: Path) -> TextGenerator:
    return load(bundle_dir)


def oracle(reference: transformers.NemotronForCausalLM, ids: list[int], count: int, **options: Any) -> list[int]:
    options = {"do_sample": False, "eos_token_id": [2, 319], "pad_token_id": 0} | options
    return reference.generate(torch.tensor([ids]), max_new_tokens=count, **options)[0, len(ids) :].tolist()


def test_greedy_text_is_that_of_transformers(model: TextGenerator, reference: transformers.NemotronForCausalLM) -> None:
    result = model.generate(PROMPTS, max_new_tokens=40)
    assert result.backend == "onnxruntime-cpu"
    for prompt, row in zip(PROMPTS, result.sequences, strict=True):
        ids = model.tokenizer.encode(prompt)
        assert row.token_ids == oracle(reference, ids, 40)
        assert row.prompt_tokens == len(ids)


def test_the_repetition_penalty_is_that_of_transformers(
    model: TextGenerator, reference: transformers.NemotronForCausalLM
) -> None:
    ids = model.tokenizer.encode(PROMPTS[1])
    row = model.generate([ids], max_new_tokens=30, repetition_penalty=1.3).sequences[0]
    assert row.token_ids == oracle(reference, ids, 30, repetition_penalty=1.3)


def test_prompts_may_be_texts_or_ids_one_or_many(model: TextGenerator) -> None:
    ids = model.tokenizer.encode("Mars")
    expected = model.generate("Mars", max_new_tokens=4).sequences
    for prompts in (["Mars"], ids, [ids], np.array(ids)):
        assert model.generate(prompts, max_new_tokens=4).sequences == expected
    assert model.generate([ids, "Mars"], max_new_tokens=4).sequences == expected * 2


def test_two_running_texts_do_not_disturb_each_other(model: TextGenerator) -> None:
    expected = [model.generate(prompt, max_new_tokens=12).sequences[0].token_ids for prompt in PROMPTS[:2]]
    streams = [model.stream(prompt, max_new_tokens=12) for prompt in PROMPTS[:2]]
    tokens: list[list[int]] = [[], []]
    for events in zip(*streams, strict=True):
        for row, event in zip(tokens, events, strict=True):
            row.append(event.token_id)
    assert tokens == expected


def test_prefill_in_chunks_gives_the_same_text(model: TextGenerator) -> None:
    expected = model.generate(PROMPTS, max_new_tokens=12)
    chunked = model.generate(PROMPTS, max_new_tokens=12, prefill_chunk=3)
    assert chunked.sequences == expected.sequences


def test_the_bundle_ends_what_its_length_allows(model: TextGenerator) -> None:
    row = model.generate([[5] * 90], max_new_tokens=50, ignore_eos=True).sequences[0]
    assert (len(row.token_ids), row.finish_reason) == (7, "length")
    row = model.generate([[5] * 4], max_new_tokens=50, ignore_eos=True, max_length=10).sequences[0]
    assert (len(row.token_ids), row.finish_reason) == (7, "length")


def test_eos_ends_a_text_unless_ignored(
    bundle_copy: Path, model: TextGenerator, reference: transformers.NemotronForCausalLM
) -> None:
    tokens = model.generate("Mars", max_new_tokens=9).sequences[0].token_ids
    (bundle_copy / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[3]}))
    redescribe(bundle_copy)
    early = load(bundle_copy)
    expected = oracle(reference, early.tokenizer.encode("Mars"), 9, eos_token_id=tokens[3])
    row = early.generate("Mars", max_new_tokens=9).sequences[0]
    assert (row.token_ids, row.finish_reason) == (expected, "eos")
    row = early.generate("Mars", max_new_tokens=9, ignore_eos=True).sequences[0]
    assert (row.token_ids, row.finish_reason) == (tokens, "length")
    row = model.generate("Mars", max_new_tokens=9, eos_token_ids=[tokens[3]]).sequences[0]
    assert (row.token_ids, row.finish_reason) == (expected, "eos")


def test_a_single_stop_string_is_not_taken_apart(model: TextGenerator) -> None:
    text = model.generate("Mars", max_new_tokens=20).sequences[0].text
    stop = next(text[n : n + 2] for n in range(6, 20) if text[n : n + 2].isascii())
    row = model.generate("Mars", max_new_tokens=20, stop=stop).sequences[0]
    assert (row.text, row.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_conversation_is_a_prompt(model: TextGenerator) -> None:
    ids = model.encode_chat([{"role": "user", "content": "Mars?"}])
    assert model.generate([ids], max_new_tokens=3).sequences[0].prompt_tokens == len(ids)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "a prompt is empty"),
        (["Mars", ""], {}, "a prompt is empty"),
        ([], {}, "there is no prompt"),
        ([[]], {}, "prompt 1 is empty"),
        ([[5] * 97], {}, "prompt 1 has 97 tokens, the capacity is 96"),
        ([[5] * 11], {"max_length": 10}, "prompt 1 has 11 tokens, the capacity is 10"),
        ([[5, 320]], {}, "token id 320 is outside the vocabulary of 320"),
        ("Mars", {"temperature": -1.0}, "temperature should be 0"),
        ("Mars", {"top_p": 0.0}, "top_p should be above 0"),
        ("Mars", {"max_length": 97}, r"max_length should be within 1\.\.96"),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    model: TextGenerator, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        model.generate(prompts, **options)
    assert "\n" not in str(error.value)


def test_a_bundle_that_nobody_checked_says_so(bundle_dir: Path, tiny_bundle: Path) -> None:
    assert "exported without the parity gate" in load(bundle_dir).remarks[0]
    assert load(tiny_bundle).remarks == []


def test_drafts_change_no_token(model: TextGenerator, reference: transformers.NemotronForCausalLM) -> None:
    prompt = PROMPTS[1] * 2
    row = model.generate(prompt, max_new_tokens=30, prompt_lookup=True, ignore_eos=True).sequences[0]
    assert row.token_ids == oracle(reference, model.tokenizer.encode(prompt), 30, eos_token_id=None)


def test_requests_of_a_running_batch_answer_as_transformers_does(
    model: TextGenerator, reference: transformers.NemotronForCausalLM
) -> None:
    batch = model.batch(slots=2, max_length=90)
    requests = [batch.submit(prompt, max_new_tokens=count) for prompt, count in zip(PROMPTS, (25, 4, 30), strict=True)]
    next(requests[2])
    late = batch.submit(PROMPTS[1], max_new_tokens=20)  # begins in a slot that has it already
    streamed = batch.stream(PROMPTS[0], max_new_tokens=10)
    batch.run()
    for prompt, request in zip([*PROMPTS, PROMPTS[1]], [*requests, late], strict=True):
        said = request.result()
        expected = oracle(reference, model.tokenizer.encode(prompt), request.row.settings.max_new_tokens)
        assert said.token_ids == expected
        assert said.text == model.tokenizer.decode([token for token in expected if token not in (2, 319)])
    assert [event.row for event in streamed] == [0] * 10


def test_a_stream_that_is_closed_leaves_the_batch(model: TextGenerator) -> None:
    batch = model.batch(slots=1)
    stream = batch.stream("Mars", max_new_tokens=60, ignore_eos=True)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert not batch.step()
    assert len(batch.submit("Our solar", max_new_tokens=3).result().token_ids) == 3


def test_a_batch_of_more_tokens_than_the_bundle_has_is_refused(model: TextGenerator) -> None:
    with pytest.raises(UserError, match="passes the 96"):
        model.batch(max_length=97)
    with pytest.raises(UserError, match="do not fit a slot of 20"):
        model.batch(max_length=20).submit("Mars", max_new_tokens=40, max_length=60)
