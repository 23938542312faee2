"""The oracle is transformers' own pipeline on the same weights."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from corruptions import redescribe

from runtime import load, pipeline
from runtime.errors import UserError
from runtime.pipelines.text_generation import TextGenerationPipeline

TEXTS = ["Our solar", "Mars is red with rust. Jupiter", "日"]
CHAT = [{"role": "user", "content": "Mars?"}]
LONGER = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is Jupiter?"},
    {"role": "assistant", "content": "It is "},
]


@pytest.fixture(scope="module")
def theirs(reference: transformers.NemotronForCausalLM, bundle_dir: Path) -> Any:
    model = copy.deepcopy(reference)
    model.generation_config = transformers.GenerationConfig(eos_token_id=[2, 319])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(bundle_dir / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=(bundle_dir / "chat_template.jinja").read_text(),
    )
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")


@pytest.fixture(scope="module")
def ours(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TextGenerationPipeline:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return pipeline("text-generation", bundle_dir)


@pytest.mark.parametrize(
    ("inputs", "arguments"),
    [
        (TEXTS[0], {}),
        (TEXTS[:1], {}),
        (TEXTS, {}),
        (TEXTS, {"return_full_text": False}),
        (TEXTS[0], {"return_tensors": True}),
        (TEXTS, {"return_tensors": True}),
        (CHAT, {}),
        ([CHAT, LONGER], {}),
        (CHAT, {"return_full_text": False}),
        (LONGER, {}),
        (LONGER, {"return_full_text": False}),
        (LONGER, {"continue_final_message": False}),
        (CHAT, {"continue_final_message": True}),
        (TEXTS[1], {"repetition_penalty": 1.3}),
        (TEXTS[1], {"temperature": None, "top_k": None, "top_p": None}),
        (TEXTS[1], {"eos_token_id": list(range(100, 200))}),
        (TEXTS[1], {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 40}),
    ],
)
def test_greedy_results_are_those_of_transformers(
    ours: TextGenerationPipeline, theirs: Any, inputs: Any, arguments: dict[str, Any]
) -> None:
    arguments = {"max_new_tokens": 15, "do_sample": False} | arguments
    before = copy.deepcopy(inputs)
    assert ours(inputs, **arguments) == theirs(inputs, **arguments)
    assert inputs == before


def test_max_length_counts_the_prompt(ours: TextGenerationPipeline, theirs: Any) -> None:
    for text in TEXTS:
        found = ours(text, max_length=25, do_sample=False, return_tensors=True)
        assert found == theirs(text, max_length=25, do_sample=False, return_tensors=True)


def test_a_stop_string_ends_a_text_and_is_part_of_it(ours: TextGenerationPipeline, theirs: Any) -> None:
    arguments = {"max_new_tokens": 20, "do_sample": False, "return_full_text": False}
    (row,) = ours("Mars", **arguments)
    text = row["generated_text"]
    stop = next(text[n : n + 2] for n in range(6, 20) if text[n : n + 2].isascii())
    for stops in (stop, ["nowhere", stop]):
        found = ours("Mars", stop_sequence=stops, **arguments)
        assert found == theirs("Mars", stop_sequence=stops, **arguments)
        assert stop in found[0]["generated_text"]


@pytest.mark.parametrize("draws", [{"do_sample": False}, {"seed": 5, "temperature": 1.5}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 8])
def test_texts_of_a_batch_go_on_as_each_does_alone(ours: TextGenerationPipeline, size: int, draws: Any) -> None:
    found = ours([*TEXTS, TEXTS[1]], batch_size=size, max_new_tokens=20, **draws)
    assert found == [ours(text, max_new_tokens=20, **draws) for text in [*TEXTS, TEXTS[1]]]


def test_tokens_are_drawn_as_transformers_does_unless_the_checkpoint_says_otherwise(
    ours: TextGenerationPipeline, bundle_copy: Path
) -> None:
    """Its pipeline's temperature, its top_k; of generation_config.json what that has."""
    defaults = transformers.TextGenerationPipeline._default_generation_config
    assert defaults.do_sample
    assert defaults.max_new_tokens == 256
    wishes = {"temperature": defaults.temperature, "top_k": 50, "seed": 3, "max_new_tokens": 12}
    expected = ours.model.generate("Mars", **wishes).sequences[0].text
    assert ours("Mars", seed=3, max_new_tokens=12, return_full_text=False) == [{"generated_text": expected}]
    config = {"temperature": 2.0, "top_p": 0.9, "max_new_tokens": 7, "eos_token_id": []}
    (bundle_copy / "generation_config.json").write_text(json.dumps(config))
    redescribe(bundle_copy)
    expected = load(bundle_copy).generate("Mars", temperature=2.0, seed=3, max_new_tokens=7).sequences[0].text
    assert pipeline(bundle_copy)("Mars", seed=3, return_full_text=False) == [{"generated_text": expected}]
    (bundle_copy / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": [2, 319]}))
    redescribe(bundle_copy)
    assert pipeline(bundle_copy)("Mars", max_new_tokens=9) == ours("Mars", max_new_tokens=9, do_sample=False)


def test_none_is_no_temperature_and_no_cut(ours: TextGenerationPipeline) -> None:
    found = ours("Mars", temperature=None, top_k=None, seed=1, max_new_tokens=12, return_full_text=False)
    plain = ours.model.generate("Mars", temperature=1.0, top_k=0, seed=1, max_new_tokens=12)
    assert found == [{"generated_text": plain.sequences[0].text}]


def test_a_prompt_may_be_gone_on_with_several_times(ours: TextGenerationPipeline) -> None:
    wishes: Any = {"temperature": 2.0, "max_new_tokens": 12}
    found = ours(TEXTS[:2], num_return_sequences=3, seed=10, **wishes)
    assert found == [[ours(text, seed=10 + n, **wishes)[0] for n in range(3)] for text in TEXTS[:2]]
    assert len({row["generated_text"] for row in found[0]}) == 3
    assert [len(ours(inputs, num_return_sequences=2, **wishes)) for inputs in ("Mars", CHAT)] == [2, 2]


def test_arguments_of_the_pipeline_hold_unless_a_call_says_otherwise(bundle_dir: Path) -> None:
    pipe = pipeline(model=bundle_dir, do_sample=False, max_new_tokens=5, return_full_text=False)
    plain = pipeline(bundle_dir)
    assert pipe("Mars") == plain("Mars", do_sample=False, max_new_tokens=5, return_full_text=False)
    assert pipe("Mars", max_new_tokens=8, return_full_text=True) == plain("Mars", do_sample=False, max_new_tokens=8)
    assert set(pipe("Mars", return_tensors=True)[0]) == {"generated_token_ids"}


def test_no_more_runs_at_once_than_an_engine_takes(
    ours: TextGenerationPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = []
    batch = ours.model.batch
    monkeypatch.setattr(ours.model, "batch", lambda **sizes: (slots.append(sizes["slots"]), batch(**sizes))[1])
    expected = ours(TEXTS, do_sample=False, max_new_tokens=4)
    monkeypatch.setattr(ours.model, "max_slots", 2)
    assert ours(TEXTS, do_sample=False, max_new_tokens=4) == expected
    assert slots == [3, 2]


def test_a_text_ends_where_the_bundle_does(ours: TextGenerationPipeline) -> None:
    (row,) = ours("Mars", eos_token_id=None, do_sample=False, max_new_tokens=500, return_tensors=True)
    assert len(row["generated_token_ids"]) == ours.model.max_length + 1  # the last one was not sent again


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ("Mars", {"num_beams": 4}, "text-generation does not take num_beams; known: batch_size, continue_final_mess"),
        (
            "Mars",
            {"num_return_sequences": 2, "do_sample": False},
            "2 sequences without do_sample would all be the same",
        ),
        ("Mars", {"num_return_sequences": 0}, "num_return_sequences should be at least 1, not 0"),
        ("Mars", {"return_tensors": True, "return_full_text": True}, "return_full_text is about text"),
        ("Mars", {"max_new_tokens": 0}, "max_new_tokens should be at least 1; found 0"),
        ("Mars", {"max_length": 2}, "a prompt has [3-9] tokens, max_length is 2"),
        ("Mars", {"top_p": 0.0}, "top_p should be above 0"),
        ("Mars", {"batch_size": 0}, "batch_size should be at least 1, not 0"),
        (["Mars", "x" * 200], {}, "prompt 2 has 201 tokens, the capacity is 96"),
        ("", {}, "a prompt is empty"),
        ([], {}, "there is no prompt"),
        ([CHAT, []], {}, "a conversation is empty"),
        ({"role": "user", "content": "Mars?"}, {}, "text_inputs should be a text, a conversation .*; found dict$"),
        (["Mars", CHAT], {}, "text_inputs should be .*; found list of list, str"),
        ([{"text": "Mars?"}], {}, 'a message should be {"role": …, "content": …}; found {.text.: .Mars'),
    ],
)
def test_bad_input_is_one_line_that_names_it(
    ours: TextGenerationPipeline, inputs: Any, arguments: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        ours(inputs, **arguments)
    assert "\n" not in str(error.value)
