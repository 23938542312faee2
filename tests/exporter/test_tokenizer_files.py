"""Whatever form a checkpoint's tokenizer and template have, its bundle chats and reads as transformers does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint, write_tokenizer
from refusals import assert_tells, snapshot
from sentencepiece_models import SIZE, added, train, write_config
from transformers import AutoTokenizer

from exporter import tokenizer_files
from exporter.checkpoint import Checkpoint
from exporter.export import ExportOptions, export
from runtime.bundle import Bundle
from runtime.chat_template import ChatTemplate
from runtime.errors import UserError
from runtime.tokenizer import Tokenizer as RuntimeTokenizer

CHAT = [{"role": "user", "content": "Is Mars red?"}, {"role": "assistant", "content": "Yes."}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENS = {"bos_token": "t1", "eos_token": {"__type": "AddedToken", **added("t2")}}


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a sentencepiece model only, whose embedding has rows that no token uses."""
    path = write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "padded", vocab_size=SIZE + 41)
    (path / "tokenizer.json").unlink()
    train(path)
    return path


def written(path: Path, target: Path) -> Path:
    target.mkdir()
    checkpoint = Checkpoint.open(path)
    tokenizer_files.check_tokenizer(checkpoint)
    tokenizer_files.write_tokenizer(checkpoint, target)
    return target


def refusal(path: Path) -> UserError:
    with pytest.raises(UserError) as refused:
        tokenizer_files.check_tokenizer(Checkpoint.open(path))
    return refused.value


def rendered(directory: Path) -> str:
    """The chat as the runtime renders it from a bundle's files."""
    config = json.loads((directory / "tokenizer_config.json").read_text())
    tokens = {
        name: token if isinstance(token, str) else token["content"]
        for name, token in config.items()
        if name in ("bos_token", "eos_token", "unk_token", "pad_token")
    }
    path = directory / "chat_template.jinja"
    return ChatTemplate(path.read_text(encoding="utf-8"), path).render(CHAT, tokens)


def theirs(path: Path, **options: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    text: str = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True, **options)
    return text


def test_a_checkpoint_with_a_sentencepiece_model_only_gets_a_tokenizer_json(padded: Path, tmp_path: Path) -> None:
    before = snapshot(padded)
    target = written(padded, tmp_path / "b")
    assert snapshot(padded) == before
    assert {path.name for path in target.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    roles = json.loads((target / "tokenizer_config.json").read_text())
    assert roles == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    reloaded = AutoTokenizer.from_pretrained(target, local_files_only=True)
    assert reloaded.encode("Mars <s>") == reloaded.backend_tokenizer.encode("Mars <s>").ids


@pytest.mark.usefixtures("quick")
def test_a_bundle_of_a_sentencepiece_checkpoint_reads_text_as_sentencepiece(small_copy: Path, tmp_path: Path) -> None:
    (small_copy / "tokenizer.json").unlink()
    oracle = train(small_copy, byte_fallback=False, vocab_size=90, required_chars="", character_coverage=0.99)
    write_config(small_copy, add_bos_token=True)
    bundle = Bundle.open(export(small_copy, tmp_path / "b", ExportOptions(verify=False)).bundle)
    assert RuntimeTokenizer(bundle).encode("Mars is red.") == [1, *oracle.encode("Mars is red.")]
    assert not bundle.changed_files()


def test_a_refused_conversion_leaves_nothing_behind(small_copy: Path) -> None:
    (small_copy / "tokenizer.json").unlink()
    train(small_copy, normalization_rule_name="nmt_nfkc")
    before = snapshot(small_copy)
    assert_tells(refusal(small_copy), small_copy / "tokenizer.model", "cannot be converted")
    assert snapshot(small_copy) == before


def test_a_converted_model_of_a_larger_vocabulary_is_refused(small_copy: Path) -> None:
    (small_copy / "tokenizer.json").unlink()
    train(small_copy)
    assert_tells(refusal(small_copy), small_copy / "tokenizer.model", f"token id {SIZE - 1}", "ends at 96")


def test_a_tokenizer_json_goes_before_a_sentencepiece_model(small_copy: Path, tmp_path: Path) -> None:
    (small_copy / "tokenizer.model").write_bytes(b"not read")
    target = written(small_copy, tmp_path / "b")
    assert (target / "tokenizer.json").read_bytes() == (small_copy / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("vocab", [1, 50, 96])
def test_a_model_may_have_more_rows_than_the_tokenizer_has_tokens(small_copy: Path, tmp_path: Path, vocab) -> None:
    write_tokenizer(small_copy, vocab)
    assert (written(small_copy, tmp_path / "b") / "tokenizer.json").is_file()


def test_a_converted_checkpoint_chats_with_the_tokens_of_its_model(padded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(padded, tmp_path / "padded"))
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    assert rendered(written(copy, tmp_path / "b")) == theirs(copy)
    assert rendered(tmp_path / "b").startswith("<s>[user]")


FORMS: dict[str, dict[str, Any]] = {
    "a file": {"chat_template.jinja": TEMPLATE},
    "a file beside others": {
        "chat_template.jinja": TEMPLATE,
        "additional_chat_templates/tool_use.jinja": "no",
    },
    "a folder's default": {
        "chat_template.jinja": "no",
        "additional_chat_templates/default.jinja": TEMPLATE,
    },
    "text": {"tokenizer_config.json": {"chat_template": TEMPLATE}},
    "a named list": {
        "tokenizer_config.json": {
            "chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        }
    },
    "a file and text": {"chat_template.jinja": TEMPLATE, "tokenizer_config.json": {"chat_template": "no"}},
    "text and the older file": {
        "tokenizer_config.json": {"chat_template": TEMPLATE},
        "chat_template.json": {"chat_template": "no"},
    },
}


def write_forms(directory: Path, files: dict[str, Any]) -> None:
    for name, content in ({"tokenizer_config.json": {}} | files).items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        value = content | TOKENS if name == "tokenizer_config.json" else content
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


@pytest.mark.parametrize("files", FORMS.values(), ids=FORMS)
def test_a_chat_is_rendered_from_the_template_that_transformers_takes(small_copy: Path, tmp_path: Path, files) -> None:
    write_forms(small_copy, files)
    expected = "t1[user]Is Mars red?t2\n[assistant]Yes.t2\n[assistant]"
    assert rendered(written(small_copy, tmp_path / "b")) == theirs(small_copy) == expected


def test_the_template_file_of_older_checkpoints_is_taken(small_copy: Path, tmp_path: Path) -> None:
    write_forms(small_copy, {"chat_template.json": {"chat_template": TEMPLATE}})
    assert rendered(written(small_copy, tmp_path / "b")) == theirs(small_copy, chat_template=TEMPLATE)


@pytest.mark.parametrize(
    ("files", "place", "named"),
    [
        (
            {"additional_chat_templates/rag.jinja": "x", "additional_chat_templates/tool_use.jinja": "y"},
            "additional_chat_templates",
            "rag, tool_use",
        ),
        ({"chat_template.json": {"chat_template": [{"name": "rag", "template": "x"}]}}, "chat_template.json", "rag"),
        ({"chat_template.json": {"chat_template": {"rag": "x"}}}, "chat_template.json", "rag"),
        ({"chat_template.json": {"chat_template": 3}}, "chat_template.json", "int"),
        ({"chat_template.json": "{"}, "chat_template.json", "is not JSON"),
    ],
)
def test_templates_without_a_default_are_refused(small_copy: Path, files, place: str, named: str) -> None:
    write_forms(small_copy, files)
    assert_tells(refusal(small_copy), small_copy / place, named)


def test_the_tokens_of_a_converted_model_do_not_hide_those_of_the_checkpoint(padded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(padded, tmp_path / "padded"))
    write_config(copy, bos_token="</s>", unk_token=None, model_max_length=64)
    config = json.loads((written(copy, tmp_path / "b") / "tokenizer_config.json").read_text())
    assert config == {"bos_token": "</s>", "eos_token": "</s>", "unk_token": None, "model_max_length": 64}
