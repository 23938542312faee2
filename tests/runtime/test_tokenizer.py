"""The oracle of encoding is transformers' tokenizer on the same files; of streams, the whole decode."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.manifest import Manifest
from runtime.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(bundle_dir: Path) -> Tokenizer:
    return Tokenizer(Bundle.open(bundle_dir))


@pytest.fixture(scope="session")
def hf_tokenizer(bundle_dir: Path) -> Any:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(bundle_dir / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=(bundle_dir / "chat_template.jinja").read_text(),
    )


@pytest.fixture(scope="session")
def sentencepiece_like(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Like a converted sentencepiece model: spaces as ▁, byte tokens, a dropped first space."""
    characters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdé"]
    vocabulary = {character: n for n, character in enumerate([*characters, "▁a", "bc"])}
    merges = [("▁", "a"), ("b", "c")]
    model = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    inner = tokenizers.Tokenizer(model)
    inner.add_special_tokens(["<s>", "</s>"])
    d = tokenizers.decoders
    inner.decoder = d.Sequence([d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)])
    path = tmp_path_factory.mktemp("sentencepiece")
    inner.save(str(path / "tokenizer.json"))
    return Tokenizer(Bundle(path, Bundle.open(bundle_dir).manifest))


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@settings(deadline=None)
@given(st.text())
def test_any_text_streams_to_itself_in_whole_characters(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)[1:]
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, 325), max_size=40))
def test_any_tokens_stream_to_their_whole_decode(tokenizer: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


BYTES = st.sampled_from([3 + byte for byte in (*"é🪐x".encode(), 0xFF)])


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(BYTES, st.integers(0, 2), st.integers(259, 266)), max_size=40))
def test_byte_tokens_stream_to_their_whole_decode(sentencepiece_like: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(sentencepiece_like, ids)) == sentencepiece_like.decode(ids)


@settings(deadline=None)
@given(st.text("ab cdé🪐\n"))
def test_byte_tokens_stream_in_whole_characters(sentencepiece_like: Tokenizer, text: str) -> None:
    ids = sentencepiece_like.encode(" " + text.replace(" ", "▁"))
    assert all("\ufffd" not in piece for piece in stream(sentencepiece_like, ids))


def test_text_is_shown_as_soon_as_it_is_settled(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Mars 🚀")[1:]
    pieces = stream(tokenizer, ids)
    shown = [piece for piece in pieces if piece]
    assert len(shown) >= 3
    assert shown[-1].endswith("🚀")
    assert pieces[-1] == ""  # the last token's text came with the token


def test_encoding_is_that_of_transformers(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    for text in ("Our solar system", " naïve  café\n", "日本語 🪐", "<s> not a start </s>"):
        assert tokenizer.encode(text) == hf_tokenizer(text)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == hf_tokenizer.decode(
            tokenizer.encode(text), skip_special_tokens=True
        )


def test_a_chat_is_written_as_transformers_writes_it(tokenizer: Tokenizer, hf_tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": 'Say "no" <b>& no more</b>'},
        {"role": "user", "content": "日本語?", "name": None},
    ]
    expected = hf_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render_chat(chat) == expected
    assert tokenizer.encode_chat(chat) == hf_tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.encode_chat(chat)[0] == 1  # one <s>: the template's own, not the tokenizer's too
    assert tokenizer.encode_chat(chat)[1] != 1


def test_a_checkpoint_without_a_template_cannot_chat(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    files = {name: file for name, file in bundle.manifest.files.items() if name != "chat_template.jinja"}
    plain = Bundle(bundle.path, replace(bundle.manifest, files=files))
    with pytest.raises(UserError, match=r"has no chat template: .*raw text instead"):
        Tokenizer(plain).encode_chat([{"role": "user", "content": "hi"}])


def test_a_chat_without_messages_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="at least one message"):
        tokenizer.encode_chat([])


def test_a_damaged_tokenizer_is_named(bundle_copy: Path) -> None:
    (bundle_copy / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(UserError, match=r"tokenizer.json is no tokenizer .*export the bundle again"):
        Tokenizer(Bundle(bundle_copy, Manifest.load(bundle_copy)))


def test_a_tokenizer_that_pads_or_cuts_does_so_no_more(bundle_copy: Path, tokenizer: Tokenizer) -> None:
    inner = tokenizers.Tokenizer.from_file(str(bundle_copy / "tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(bundle_copy / "tokenizer.json"))
    text = "Our solar system is the Sun"
    assert Tokenizer(Bundle(bundle_copy, Manifest.load(bundle_copy))).encode(text) == tokenizer.encode(text)
