"""The files that go into a bundle beside the graph: configuration, tokenizer, chat template, genai configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from exporter.checkpoint import Checkpoint
from exporter.spec import NemotronSpec
from exporter.tasks import GENERATION, Task
from exporter.text_files import read_object, read_text
from runtime.chat_template import ChatTemplate
from runtime.contract import ATTENTION_MASK, INPUT_IDS, LOGITS
from runtime.errors import UserError
from runtime.manifest import CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, MODEL, TOKENIZER, TOKENIZER_CONFIG

GENAI_CONFIG = "genai_config.json"
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SEARCH = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}  # transformers' defaults


def check_companions(checkpoint: Checkpoint, task: Task) -> None:
    """Check the tokenizer, its template and the generation defaults before any work is done.

    Raises:
        UserError: no tokenizer.json, or one that cannot be loaded or that has tokens the model does not know; or
            another file that does not hold what it should.
    """
    path = checkpoint.path / TOKENIZER
    if not path.is_file():
        raise UserError(
            f"{checkpoint.path} has no {TOKENIZER}; write one with transformers: "
            "AutoTokenizer.from_pretrained(checkpoint).save_pretrained(checkpoint)"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception for every fault of the file
        raise UserError(f"{path} cannot be loaded: {error}; download the checkpoint again") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= checkpoint.spec.vocab:
        raise UserError(
            f"{path} has token id {largest}, the model's vocabulary ends at {checkpoint.spec.vocab - 1}; "
            "tokenizer and weights are not of one model"
        )
    template = _chat_template(checkpoint.path)
    if template is not None:
        ChatTemplate(template, checkpoint.path / CHAT_TEMPLATE)
    if task.name == GENERATION:
        genai_config(checkpoint.spec, _generation_defaults(checkpoint), checkpoint.spec.max_positions)


def write_companions(checkpoint: Checkpoint, directory: Path, task: Task) -> None:
    """Copy or write everything our runtime needs beside model.onnx into `directory`."""
    for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG):
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, directory / name)
    if task.name == GENERATION:
        generation = _generation_defaults(checkpoint)  # resolved once, so that every runtime stops at the same tokens
        _write_json(directory / GENERATION_CONFIG, {name: v for name, v in generation.items() if v is not None})
    template = _chat_template(checkpoint.path)
    if template is not None:
        (directory / CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def write_genai_config(checkpoint: Checkpoint, directory: Path, max_length: int) -> None:
    """Write what onnxruntime-genai needs to run the bundle's directory, whose graph has target `onnxruntime`."""
    config = genai_config(checkpoint.spec, _generation_defaults(checkpoint), max_length)
    _write_json(directory / GENAI_CONFIG, config)


def genai_config(spec: NemotronSpec, generation: dict[str, Any], max_length: int) -> dict[str, Any]:
    """What onnxruntime-genai needs to run the bundle's directory as it is. It refuses keys it does not know."""
    tokens = {name: generation[name] for name in SPECIAL_TOKENS}
    return {
        "model": {
            "type": "nemotron",
            **{name: value for name, value in tokens.items() if value is not None},
            "context_length": max_length,
            "vocab_size": spec.vocab,
            "decoder": {
                "filename": MODEL,
                "session_options": {"provider_options": []},
                "head_size": spec.head_dim,
                "hidden_size": spec.hidden,
                "num_attention_heads": spec.heads,
                "num_hidden_layers": spec.layers,
                "num_key_value_heads": spec.kv_heads,
                "inputs": {
                    "input_ids": INPUT_IDS,
                    "attention_mask": ATTENTION_MASK,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "max_length": max_length,
            "past_present_share_buffer": True,
            "do_sample": bool(generation.get("do_sample", False)),
            **{name: default if generation.get(name) is None else generation[name] for name, default in SEARCH.items()},
        },
    }


def _generation_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """generation_config.json, with the special tokens from config.json where it names none; pad falls back to eos."""
    path = checkpoint.path / GENERATION_CONFIG
    values = read_object(path) if path.is_file() else {}
    config = checkpoint.spec.config
    for name in SPECIAL_TOKENS:
        found = values.setdefault(name, getattr(config, name))
        ids = found if isinstance(found, list) and name == "eos_token_id" else [found]
        if not all(token is None or type(token) is int for token in ids):
            raise UserError(f"{path}: {name} should be a token id, found {found!r}; correct it")
    for name in SEARCH:
        if type(values.get(name)) not in (int, float, type(None)):
            raise UserError(f"{path}: {name} should be a number, found {values[name]!r}; correct it")
    if values["pad_token_id"] is None:
        eos = values["eos_token_id"]
        values["pad_token_id"] = next(iter(eos), None) if isinstance(eos, list) else eos
    return values


def _chat_template(directory: Path) -> str | None:
    """The checkpoint's chat template: a file, or text or a named list in tokenizer_config.json, or none."""
    file, path = directory / CHAT_TEMPLATE, directory / TOKENIZER_CONFIG
    config = read_object(path) if path.is_file() else {}
    if file.is_file():
        return read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if "default" not in named:
            raise UserError(f"{path} has chat templates {', '.join(map(str, named))} but no 'default'; rename one")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise UserError(f"{path}: chat_template should be text, found {type(template).__name__}; correct it")
    return template


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
