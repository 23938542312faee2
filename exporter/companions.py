"""The files that go into a bundle beside the graph: the tokenizer, the configuration, generation."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint
from exporter.spec import NemotronSpec
from exporter.tasks import GENERATION, Task
from exporter.text_files import read_object, write_object
from exporter.tokenizer_files import check_tokenizer, write_tokenizer
from runtime.contract import ATTENTION_MASK, INPUT_IDS, LOGITS
from runtime.errors import UserError
from runtime.manifest import CONFIG, GENAI_CONFIG, GENERATION_CONFIG, MODEL

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SEARCH = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}  # transformers' defaults


def check_companions(checkpoint: Checkpoint, task: Task) -> None:
    """Check the tokenizer, its template and the generation defaults before any work is done.

    Raises:
        UserError: no tokenizer, or one that cannot be loaded or converted, or that has tokens the model does not know;
            or another file that does not hold what it should.
    """
    check_tokenizer(checkpoint)
    if task.name == GENERATION:
        check_generation(checkpoint)


def write_companions(checkpoint: Checkpoint, directory: Path, task: Task) -> None:
    """Copy or write everything our runtime needs beside model.onnx into `directory`."""
    shutil.copyfile(checkpoint.path / CONFIG, directory / CONFIG)
    write_tokenizer(checkpoint, directory)
    if task.name == GENERATION:
        write_generation(checkpoint, directory)


def check_generation(checkpoint: Checkpoint) -> None:
    """Check the special tokens and sampling defaults of a checkpoint that generates text.

    Raises:
        UserError: one of them is not what it should be, or a token is none of the model's.
    """
    genai_config(checkpoint.spec, _generation_defaults(checkpoint), checkpoint.spec.max_positions)


def write_generation(checkpoint: Checkpoint, directory: Path) -> None:
    """Write generation_config.json, resolved once, so that every runtime stops at the same tokens."""
    generation = _generation_defaults(checkpoint)
    write_object(directory / GENERATION_CONFIG, {name: v for name, v in generation.items() if v is not None})


def write_genai_config(checkpoint: Checkpoint, directory: Path, max_length: int) -> None:
    """Write what onnxruntime-genai needs to run the bundle's directory, whose graph has target `onnxruntime`."""
    config = genai_config(checkpoint.spec, _generation_defaults(checkpoint), max_length)
    write_object(directory / GENAI_CONFIG, config)


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
    for name in SPECIAL_TOKENS:
        source = path if name in values else checkpoint.path / CONFIG
        found = values.setdefault(name, getattr(checkpoint.spec.config, name))
        _check_tokens(source, name, found, checkpoint.spec.vocab)
    for name in SEARCH:
        if type(values.get(name)) not in (int, float, type(None)):
            raise UserError(f"{path}: {name} should be a number, found {values[name]!r}; correct it")
    if values["pad_token_id"] is None:
        eos = values["eos_token_id"]
        values["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return values


def _check_tokens(path: Path, name: str, found: Any, vocab: int) -> None:
    """Check that a special token is absent, an id of the model, or for the end of text a list of those."""
    ids = found if isinstance(found, list) and found and name == "eos_token_id" else [found]
    for token in ids:
        if token is None and ids is not found:
            continue
        if type(token) is not int:
            raise UserError(f"{path}: {name} should be a token id, found {found!r}; correct it")
        if not 0 <= token < vocab:
            raise UserError(
                f"{path}: {name} {token} is not within the model's vocabulary, 0…{vocab - 1}; correct it, "
                "or set it to null"
            )
