"""Tokenizer, chat template and generation defaults reach the bundle as they are, or are refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_tokenizer
from refusals import assert_tells
from tokenizers import AddedToken, Tokenizer
from transformers import NemotronConfig, PreTrainedTokenizerFast

from exporter.checkpoint import Checkpoint
from exporter.companions import check_companions, genai_config, write_companions, write_genai_config
from exporter.tasks import TASKS
from exporter.tokenizer_files import check_tokenizer
from exporter.tokenizer_files import write_tokenizer as write_tokenizer_files
from runtime.errors import UserError

TEXT = TASKS["text-generation"]

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def refusal(path: Path) -> UserError:
    with pytest.raises(UserError) as refused:
        check_companions(Checkpoint.open(path), TEXT)
    return refused.value


def written(path: Path, target: Path, max_length: int = 64) -> Path:
    target.mkdir()
    checkpoint = Checkpoint.open(path)
    check_companions(checkpoint, TEXT)
    write_companions(checkpoint, target, TEXT)
    write_genai_config(checkpoint, target, max_length)
    return target


def written_genai(path: Path, target: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((written(path, target) / "genai_config.json").read_text())
    return config


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize("others", [(), ("vocab.json", "merges.txt")])
def test_a_checkpoint_without_a_tokenizer_to_convert_is_refused_with_the_remedy(small_copy: Path, others) -> None:
    (small_copy / "tokenizer.json").unlink()
    for other in others:
        (small_copy / other).write_text("{}")
    assert_tells(refusal(small_copy), small_copy, "tokenizer.json", "save_pretrained")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"model": {"type": "Magic"}}'])
def test_a_damaged_tokenizer_is_named(small_copy: Path, content: bytes) -> None:
    (small_copy / "tokenizer.json").write_bytes(content)
    assert_tells(refusal(small_copy), small_copy / "tokenizer.json", "download the checkpoint again")


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(small_copy: Path) -> None:
    write_tokenizer(small_copy, 98)  # ids 0…97, the model knows 0…96
    assert_tells(refusal(small_copy), small_copy / "tokenizer.json", "token id 97", "ends at 96")


def test_an_added_token_beyond_the_vocabulary_is_refused(small_copy: Path) -> None:
    tokenizer = Tokenizer.from_file(str(small_copy / "tokenizer.json"))
    check_companions(Checkpoint.open(small_copy), TEXT)  # its last word is the last the model knows
    tokenizer.add_special_tokens([AddedToken("<extra>")])
    tokenizer.save(str(small_copy / "tokenizer.json"))
    assert_tells(refusal(small_copy), small_copy / "tokenizer.json", "token id 97")


def test_the_tokenizer_and_the_configurations_are_copied_byte_for_byte(tiny_checkpoint: Path, tmp_path: Path) -> None:
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    target = written(tiny_checkpoint, tmp_path / "b")
    assert {path.name for path in target.iterdir()} == names | {"genai_config.json"}
    for name in names:
        assert (target / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


@pytest.mark.parametrize(
    "kept",
    [
        {"chat_template": TEMPLATE},
        {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]},
    ],
    ids=["text", "named"],
)
def test_a_template_in_the_tokenizer_configuration_becomes_a_file(small_copy: Path, tmp_path: Path, kept) -> None:
    write_json(small_copy / "tokenizer_config.json", kept)
    assert (written(small_copy, tmp_path / "b") / "chat_template.jinja").read_text() == TEMPLATE


def test_of_two_templates_the_one_that_transformers_takes_is_taken(small_copy: Path, tmp_path: Path) -> None:
    write_json(small_copy / "tokenizer_config.json", {"chat_template": "from the configuration"})
    (small_copy / "chat_template.jinja").write_text(TEMPLATE)
    theirs = PreTrainedTokenizerFast.from_pretrained(small_copy).chat_template
    assert (written(small_copy, tmp_path / "b") / "chat_template.jinja").read_text() == theirs


def test_a_checkpoint_without_a_template_gives_a_bundle_without_one(small_copy: Path, tmp_path: Path) -> None:
    write_json(small_copy / "tokenizer_config.json", {"chat_template": None})
    assert not (written(small_copy, tmp_path / "b") / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("tokenizer_config.json", b"{", "is not JSON"),
        ("tokenizer_config.json", b"[]", "JSON object"),
        ("tokenizer_config.json", b"\xff{}", "UTF-8"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat_template"),
        ("tokenizer_config.json", b'{"chat_template": ["a"]}', "default"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "rag", "template": "x"}]}', "rag"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default", "template": 3}]}', "chat_template"),
        ("chat_template.jinja", b"\xff\xfe", "UTF-8"),
        ("chat_template.jinja", b"{% for m in messages %}{{ oops ", "refuses"),
        ("generation_config.json", b"{", "is not JSON"),
        ("generation_config.json", b"3", "JSON object"),
        ("generation_config.json", b'{"eos_token_id": "</s>"}', "eos_token_id"),
        ("generation_config.json", b'{"eos_token_id": [2, "x"]}', "eos_token_id"),
        ("generation_config.json", b'{"eos_token_id": []}', "eos_token_id"),
        ("generation_config.json", b'{"eos_token_id": [2, null]}', "eos_token_id"),
        ("generation_config.json", b'{"eos_token_id": [2, 97]}', "eos_token_id 97 is not within"),
        ("generation_config.json", b'{"eos_token_id": -1}', "eos_token_id -1 is not within"),
        ("generation_config.json", b'{"pad_token_id": -1}', "0…96; correct it, or set it to null"),
        ("generation_config.json", b'{"bos_token_id": 97}', "bos_token_id 97"),
        ("generation_config.json", b'{"pad_token_id": [2]}', "pad_token_id"),
        ("generation_config.json", b'{"bos_token_id": true}', "bos_token_id"),
        ("generation_config.json", b'{"temperature": "hot"}', "temperature"),
        ("generation_config.json", b'{"top_k": "all"}', "top_k"),
    ],
)
def test_a_damaged_file_beside_the_weights_is_named_before_any_work(small_copy: Path, name, content, named) -> None:
    (small_copy / name).write_bytes(content)
    assert_tells(refusal(small_copy), small_copy / name, named)


def test_onnxruntime_genai_is_told_the_models_measures(tiny_checkpoint: Path) -> None:
    raw = json.loads((tiny_checkpoint / "config.json").read_text())
    config = genai_config(
        Checkpoint.open(tiny_checkpoint).spec, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, 300
    )
    decoder = config["model"]["decoder"]
    assert decoder["head_size"] == raw["head_dim"]
    assert decoder["hidden_size"] == raw["hidden_size"]
    assert decoder["num_attention_heads"] == raw["num_attention_heads"]
    assert decoder["num_hidden_layers"] == raw["num_hidden_layers"]
    assert decoder["num_key_value_heads"] == raw["num_key_value_heads"]
    assert (config["model"]["type"], config["model"]["vocab_size"]) == ("nemotron", raw["vocab_size"])
    assert config["model"]["context_length"] == config["search"]["max_length"] == 300


def test_every_end_of_text_and_the_padding_reach_onnxruntime_genai(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = written_genai(tiny_checkpoint, tmp_path / "b")["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [2, 4], 0)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        (None, (1, 2, 2)),  # SMALL's own, and padding with the end of text
        ({"eos_token_id": [5, 6]}, (1, [5, 6], 5)),
        ({"eos_token_id": 7, "pad_token_id": 0}, (1, 7, 0)),
        ({"eos_token_id": [7]}, (1, [7], 7)),
        ({"eos_token_id": 96, "bos_token_id": 0}, (0, 96, 96)),
        ({"bos_token_id": 3, "pad_token_id": None}, (3, 2, 2)),
    ],
)
def test_special_tokens_come_from_the_generation_defaults_and_else_from_the_configuration(
    small_copy: Path, tmp_path: Path, generation, expected
) -> None:
    (small_copy / "generation_config.json").unlink()
    if generation is not None:
        write_json(small_copy / "generation_config.json", generation)
    model = written_genai(small_copy, tmp_path / "b")["model"]
    assert tuple(model[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")) == expected


def test_a_token_the_model_does_not_have_is_left_out(small_copy: Path, tmp_path: Path) -> None:
    write_json(small_copy / "generation_config.json", {"bos_token_id": None, "eos_token_id": None})
    model = written_genai(small_copy, tmp_path / "b")["model"]
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & set(model)


def test_a_token_of_config_json_that_the_model_does_not_have_is_named_there(small_copy: Path) -> None:
    (small_copy / "generation_config.json").unlink()
    config = json.loads((small_copy / "config.json").read_text())
    write_json(small_copy / "config.json", config | {"pad_token_id": 97})
    assert_tells(refusal(small_copy), small_copy / "config.json", "pad_token_id 97", "0…96")


def test_a_task_without_generation_needs_no_generation_files(small_copy: Path, tmp_path: Path) -> None:
    (small_copy / "generation_config.json").write_text("{")
    checkpoint = Checkpoint.open(small_copy)
    check_tokenizer(checkpoint)
    write_tokenizer_files(checkpoint, tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "chosen",
    [
        {"do_sample": True, "temperature": 0.6, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.1},
        {"do_sample": True, "temperature": 0.6, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.1},
    ],
    ids=["all", "top_k off"],
)
def test_the_sampling_that_the_checkpoint_asks_for_is_the_sampling_of_the_bundle(small_copy, tmp_path, chosen) -> None:
    write_json(small_copy / "generation_config.json", chosen)
    search = written_genai(small_copy, tmp_path / "b")["search"]
    assert {name: search[name] for name in chosen} == chosen


def test_every_runtime_of_a_bundle_ends_at_the_tokens_that_transformers_ends_at(
    small_copy: Path, tmp_path: Path
) -> None:
    """Also where no file of the checkpoint names one, so that the architecture's default counts."""
    (small_copy / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((small_copy / "config.json").read_text())
    del config["eos_token_id"]
    write_json(small_copy / "config.json", config)
    directory = written(small_copy, tmp_path / "b")
    theirs = NemotronConfig.from_pretrained(small_copy).eos_token_id
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == theirs
    assert json.loads((directory / "genai_config.json").read_text())["model"]["eos_token_id"] == theirs
