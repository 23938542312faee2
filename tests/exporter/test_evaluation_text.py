"""The text that figures rest on is read as the model reads texts, and what is no such text is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SMALL, write_tokenizer
from tokenizers import Tokenizer, processors

from exporter.evaluation_text import default_text, read_tokens, windows
from runtime.errors import UserError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint's tokenizer and configuration; texts need no weights."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    write_tokenizer(directory, SMALL["vocab_size"])
    configure(directory)
    return directory


def configure(directory: Path, name: str = "config.json", **values: object) -> None:
    base = {"model_type": "nemotron", **SMALL} if name == "config.json" else {}
    (directory / name).write_text(json.dumps({**base, **values}))


def text(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_documents_end_with_the_token_that_ends_a_text(tmp_path: Path, checkpoint: Path) -> None:
    path = text(tmp_path, "\n\nt5 t6\nt7\n\nt8\n \t\n\n\nt9\n")
    assert read_tokens(path, checkpoint) == [5, 6, 7, 2, 8, 2, 9, 2]


def test_line_ends_and_a_byte_order_mark_of_windows_change_nothing(tmp_path: Path, checkpoint: Path) -> None:
    assert read_tokens(text(tmp_path, "\ufefft5 t6\r\n\r\nt8\r\n"), checkpoint) == [5, 6, 2, 8, 2]


@pytest.mark.parametrize(
    ("file", "value", "end"),
    [
        ("generation_config.json", [4, 3], [4]),
        ("generation_config.json", None, []),
        ("generation_config.json", [], []),
        ("config.json", 7, [7]),
        ("config.json", None, []),
    ],
)
def test_the_first_token_that_ends_a_text_counts(tmp_path: Path, checkpoint: Path, file, value, end) -> None:
    configure(checkpoint, file, eos_token_id=value)
    assert read_tokens(text(tmp_path, "t5"), checkpoint) == [5, *end]


def test_generation_defaults_that_say_nothing_leave_it_to_the_configuration(tmp_path: Path, checkpoint: Path) -> None:
    configure(checkpoint, "generation_config.json", do_sample=True)
    assert read_tokens(text(tmp_path, "t5"), checkpoint) == [5, 2]


def test_the_tokenizers_special_tokens_are_added_and_its_truncation_is_not(tmp_path: Path, checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="t1 $A", special_tokens=[("t1", 1)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    assert read_tokens(text(tmp_path, "t5 t6 t7 t8\n\nt9"), checkpoint) == [1, 5, 6, 7, 8, 2, 1, 9, 2]


def test_the_trained_checkpoints_text_is_encoded_as_transformers_encodes_it(tiny_checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tiny_checkpoint)
    path = default_text("heldout.txt", tiny_checkpoint)
    documents = [part for part in path.read_text().split("\n\n") if part.strip()]
    expected = [token for document in documents for token in [*theirs(document.strip()).input_ids, 2]]
    assert read_tokens(path, tiny_checkpoint) == expected


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "is missing; give a UTF-8 text file"),
        (directory, "cannot read"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b" \n\n\t\n"), "is empty"),
        (lambda path: path.write_bytes(b"t5 \xff"), "is not UTF-8 text"),
        (lambda path: path.write_bytes(b"t5 \0 t6"), "holds a NUL"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, checkpoint: Path, damage: Callable[[Path], None], words: str
) -> None:
    path = text(tmp_path, "t5")
    damage(path)
    with pytest.raises(UserError, match=words) as refusal:
        read_tokens(path, checkpoint)
    assert str(path) in str(refusal.value)
    assert "; give" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_token_that_the_model_does_not_know_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    write_tokenizer(checkpoint, 200)
    with pytest.raises(UserError, match=r"token id 150 .*ends at 96; tokenizer and weights"):
        read_tokens(text(tmp_path, "t5 t150"), checkpoint)


def test_an_end_that_is_no_token_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    configure(checkpoint, "generation_config.json", eos_token_id="</s>")
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id should be an integer"):
        read_tokens(text(tmp_path, "t5"), checkpoint)


def test_windows_follow_each_other_and_leave_out_what_is_over() -> None:
    found = windows(list(range(20)), 4, 14)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(windows(list(range(6)), 4, 100), [[0, 1, 2, 3]])


@pytest.mark.parametrize(
    ("count", "length", "most", "words"),
    [
        (3, 4, 100, "here.txt gives 3 tokens, less than one window of 4; give a longer text"),
        (9, 4, 3, "ask for at least 4 tokens"),
        (9, 1, 9, "give windows of at least 2 tokens"),
    ],
)
def test_not_one_window_is_refused(count: int, length: int, most: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        windows(list(range(count)), length, most, Path("here.txt"))


def test_a_checkpoints_own_text_comes_before_the_packaged_one(checkpoint: Path, tiny_checkpoint: Path) -> None:
    assert default_text("heldout.txt", checkpoint) == tiny_checkpoint / "heldout.txt"
    (checkpoint / "calibration.txt").write_text("t5")
    assert default_text("calibration.txt", checkpoint) == checkpoint / "calibration.txt"
