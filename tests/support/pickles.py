"""Checkpoints as torch pickles, made from their safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

SINGLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"


def shard_name(number: int, count: int) -> str:
    return f"pytorch_model-{number:05}-of-{count:05}.bin"


def repickle(directory: Path, count: int = 1) -> None:
    """Turn a checkpoint's single safetensors file into a pickle, or into `count` of them with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if count == 1:
        torch.save(tensors, directory / SINGLE)
        return
    weight_map = {}
    for number in range(count):
        part = {name: tensors[name] for name in sorted(tensors)[number::count]}
        torch.save(part, directory / shard_name(number + 1, count))
        weight_map.update(dict.fromkeys(part, shard_name(number + 1, count)))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change(file: Path, changes: Mapping[str, Any]) -> None:
    """Put other values into a pickle, under names that it has or new ones."""
    torch.save({**torch.load(file), **changes}, file)
