"""A converted sentencepiece model, read by the runtime: the oracle is sentencepiece."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from sentencepiece_models import SIZE, TEXTS, train

from exporter.sentencepiece_conversion import convert
from exporter.special_tokens import read_special_tokens
from runtime.bundle import Bundle
from runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Pair:
    """The runtime's tokenizer and sentencepiece's, of one model."""

    ours: Tokenizer
    oracle: SentencePieceProcessor


@pytest.fixture(scope="module", params=["bpe", "unigram", "bpe with a prefix", "unigram with a prefix"])
def pair(request: pytest.FixtureRequest, bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    directory = tmp_path_factory.mktemp("converted")
    kind, _, prefix = request.param.partition(" ")
    oracle = train(directory, kind, add_dummy_prefix=bool(prefix), user_defined_symbols=["<extra_id_0>"])
    convert(directory / "tokenizer.model", read_special_tokens(directory)).save(str(directory / "tokenizer.json"))
    return Pair(Tokenizer(Bundle(directory, Bundle.open(bundle_dir).manifest)), oracle)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [*(decoder.push(token) for token in ids), decoder.flush()]


def assert_same(pair: Pair, text: str) -> None:
    ids = pair.oracle.encode(text)
    assert pair.ours.encode(text) == ids
    pieces = streamed(pair.ours, ids)
    assert "".join(pieces) == pair.ours.decode(ids) == pair.oracle.decode(ids)
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("text", TEXTS)
def test_samples_are_read_and_streamed_as_by_sentencepiece(pair: Pair, text: str) -> None:
    assert_same(pair, text)


@settings(deadline=None, max_examples=200)
@given(st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n0aé🪐"))))
def test_any_text_is_read_and_streamed_as_by_sentencepiece(pair: Pair, text: str) -> None:
    assert_same(pair, text)


def test_an_id_beyond_the_tokenizer_has_no_text(pair: Pair) -> None:
    mars = pair.oracle.encode("Mars")
    beyond = [SIZE, SIZE + 40]
    assert pair.ours.decode([*beyond, *mars, *beyond]) == "Mars"
    assert "".join(streamed(pair.ours, [*beyond, *mars, *beyond])) == "Mars"
    assert not pair.ours.visible(SIZE)
