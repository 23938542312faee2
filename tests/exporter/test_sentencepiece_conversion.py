"""A sentencepiece model becomes the tokenizer.json of the same tokenizer, or the export is refused.

The oracles are sentencepiece on the same model and, for the tokens around a text, transformers on the same files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import assert_tells
from sentencepiece import SentencePieceProcessor
from sentencepiece_models import SIZE, TEXTS, added, train, write_config
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from exporter.sentencepiece_conversion import convert, find_model, role_tokens
from exporter.special_tokens import read_special_tokens
from runtime.errors import UserError

SYMBOLS = ["<extra_id_0>", "<extra_id_1>"]


def converted(directory: Path, name: str = "tokenizer.model") -> Tokenizer:
    return convert(directory / name, read_special_tokens(directory))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text).ids)


def refusal(directory: Path) -> UserError:
    with pytest.raises(UserError) as refused:
        converted(directory)
    return refused.value


def assert_same(tokenizer: Tokenizer, oracle: SentencePieceProcessor, *more: str) -> None:
    for text in (*TEXTS, *more):
        assert ids(tokenizer, text) == oracle.encode(text), text
        assert tokenizer.decode(oracle.encode(text)) == oracle.decode(oracle.encode(text)), text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [False, True], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("collapse", [False, True], ids=["whitespace", "collapsed"])
def test_a_converted_model_reads_and_writes_as_sentencepiece(tmp_path: Path, kind, prefix, collapse) -> None:
    oracle = train(tmp_path, kind, add_dummy_prefix=prefix, remove_extra_whitespaces=collapse)
    assert_same(converted(tmp_path), oracle, "<0x0A> is no byte")


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("prefix", [False, True], ids=["no prefix", "prefix"])
def test_symbols_of_a_chat_stay_whole_wherever_they_stand(tmp_path: Path, kind, prefix) -> None:
    symbols = [*SYMBOLS, "▁▁▁▁"] if kind == "bpe" else SYMBOLS  # in a unigram model the run is a piece among others
    oracle = train(tmp_path, kind, add_dummy_prefix=prefix, user_defined_symbols=symbols)
    chat = "<extra_id_0>System\nBe brief.\n\n<extra_id_1>User\n<extra_id_0><extra_id_1>"
    assert oracle.piece_to_id("<extra_id_1>") in oracle.encode(chat)
    assert_same(converted(tmp_path), oracle, chat, "<extra_id_0>", "a    b        c      ")


def test_a_model_without_bytes_reads_what_it_does_not_know_as_sentencepiece(tmp_path: Path) -> None:
    oracle = train(tmp_path, byte_fallback=False, vocab_size=200)
    tokenizer = converted(tmp_path)
    assert oracle.unk_id() in oracle.encode("日本語")
    for text in TEXTS:
        assert ids(tokenizer, text) == oracle.encode(text)


def test_special_tokens_in_a_text_are_read_as_themselves(tmp_path: Path) -> None:
    oracle = train(tmp_path)
    tokenizer = converted(tmp_path)
    mars = oracle.encode("Mars")
    assert ids(tokenizer, "<s>Mars</s>Mars") == [1, *mars, 2, *mars]
    assert tokenizer.decode([1, *mars, 2]) == "Mars"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    ("ends", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": True, "add_eos_token": False}, [1], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False, "add_eos_token": True}, [], [2]),
        ({"add_bos_token": True, "bos_token": None}, [], []),
        ({"add_bos_token": True, "bos_token": "</s>"}, [2], []),
        ({"add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "</s>"}}, [2], []),
    ],
)
def test_a_text_gets_the_ends_that_the_checkpoint_asks_for(tmp_path: Path, kind, ends, before, after) -> None:
    oracle = train(tmp_path, kind)
    write_config(tmp_path, **ends)
    assert ids(converted(tmp_path), "Mars") == [*before, *oracle.encode("Mars"), *after]


DECLARED = {
    "in the configuration": {
        "tokenizer_config.json": {
            "pad_token": "<pad>",
            "extra_special_tokens": ["<|more|>"],
            "added_tokens_decoder": {
                "1": added("<s>"),
                str(SIZE + 1): added("<tool>", special=False),
                str(SIZE): added("<pad>"),
            },
        }
    },
    "in the older files": {
        "tokenizer_config.json": {"add_bos_token": True},
        "special_tokens_map.json": {"bos_token": "</s>", "pad_token": {"content": "<pad>"}},
        "added_tokens.json": {"<pad>": SIZE, "<tool>": SIZE + 1},
    },
    "by role only": {"tokenizer_config.json": {"pad_token": "<pad>", "additional_special_tokens": ["<|more|>"]}},
}


@pytest.mark.parametrize("files", DECLARED.values(), ids=DECLARED)
def test_added_tokens_have_the_ids_that_transformers_gives_them(tmp_path: Path, files) -> None:
    oracle = train(tmp_path)
    assert oracle.vocab_size() == SIZE
    for name, content in files.items():
        write_config(tmp_path, name, **content)
    write_config(tmp_path, "config.json", model_type="nemotron")
    tokenizer, theirs = converted(tmp_path), AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert tokenizer.get_vocab(with_added_tokens=True) == theirs.get_vocab()
    mine = tokenizer.get_added_tokens_decoder()
    assert {index: token.special for index, token in mine.items()} == {
        index: token.special for index, token in theirs.added_tokens_decoder.items()
    }
    text = "<pad>Mars<tool>Mars<|more|>"
    assert ids(tokenizer, text) == theirs.encode(text)
    roles = role_tokens(tmp_path / "tokenizer.model", read_special_tokens(tmp_path))
    assert roles == theirs.special_tokens_map


def test_an_added_token_that_would_get_another_id_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    write_config(tmp_path, added_tokens_decoder={str(SIZE + 7): added("<tool>")})
    assert_tells(refusal(tmp_path), tmp_path / "tokenizer.model", "'<tool>'", SIZE + 7, SIZE, "tokenizer.json")


def test_a_model_that_tokenizers_reads_otherwise_is_refused_with_the_text(tmp_path: Path) -> None:
    train(tmp_path, normalization_rule_name="nmt_nfkc")  # tokenizers reads \r\n as one character
    assert_tells(refusal(tmp_path), tmp_path / "tokenizer.model", r"\t\ta tab", "sentencepiece", "authors")


@pytest.mark.parametrize("kind", ["word", "char"])
def test_a_model_of_another_type_is_refused(tmp_path: Path, kind: str) -> None:
    train(tmp_path, kind, byte_fallback=False)
    assert_tells(refusal(tmp_path), tmp_path / "tokenizer.model", "not a unigram or BPE model")


def test_a_space_before_the_beginning_only_is_refused(tmp_path: Path) -> None:
    train(tmp_path, add_dummy_prefix=True)
    write_config(tmp_path, legacy=False)
    assert_tells(refusal(tmp_path), "legacy")


@pytest.mark.parametrize("content", [b"", b"sentencepiece", b"\xff\xff\xff", b"IQ== 0\nIg== 1\n"])
def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert_tells(refusal(tmp_path), tmp_path / "tokenizer.model", "sentencepiece", "tokenizer.json")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("tokenizer_config.json", {"bos_token": 3}, "bos_token"),
        ("tokenizer_config.json", {"eos_token": {"text": "</s>"}}, "eos_token"),
        ("tokenizer_config.json", {"added_tokens_decoder": ["<pad>"]}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": "<pad>"}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": added("<pad>")}}, "'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"3": added("<pad>") | {"lstrip": 3}}}, "lstrip"),
        ("tokenizer_config.json", {"extra_special_tokens": "<pad>"}, "extra_special_tokens"),
        ("special_tokens_map.json", {"pad_token": []}, "pad_token"),
        ("added_tokens.json", {"<pad>": "many"}, "'many'"),
    ],
)
def test_a_damaged_list_of_tokens_is_named(tmp_path: Path, name, content, named) -> None:
    write_config(tmp_path, name, **content)
    with pytest.raises(UserError) as refused:
        read_special_tokens(tmp_path)
    assert_tells(refused.value, tmp_path / name, named, "correct it")


def test_the_model_is_found_by_any_of_its_names(tmp_path: Path) -> None:
    assert find_model(tmp_path) is None
    for name in ("256k.model", "spiece.model", "tokenizer.model"):  # each goes before the one before it
        (tmp_path / name).touch()
        assert find_model(tmp_path) == tmp_path / name


def test_of_several_models_none_is_guessed(tmp_path: Path) -> None:
    for name in ("a.model", "b.model"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as refused:
        find_model(tmp_path)
    assert_tells(refused.value, "a.model, b.model", "tokenizer.model")
