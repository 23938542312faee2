"""What a checkpoint's configuration and safetensors headers say, read with the standard library alone.

Pickles are measured and not opened: that needs torch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from exporter.inspection.tensors import COMPONENTS, purpose
from exporter.pickle_files import is_pickle
from exporter.tensor_files import LAYOUTS
from exporter.text_files import read_object
from runtime.errors import UserError
from runtime.manifest import CONFIG

_MAX_HEADER = 100_000_000  # bytes, the safetensors format's own limit

_CACHES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}  # bytes of a number

_NUMBERS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
    "max_positions": "max_position_embeddings",
    "activation": "hidden_act",
    "tied_embeddings": "tie_word_embeddings",
}


class Header(NamedTuple):
    """A tensor of a safetensors file: name, dtype as the format has it, number of elements, and bytes."""

    name: str
    dtype: str
    elements: int
    bytes: int


def describe_checkpoint(path: Path) -> dict[str, Any]:
    """The JSON object of `inspect` for a checkpoint directory.

    The configuration is shown as it is written, not as transformers completes it: that is `exporter.spec`'s.

    Where the weights are pickles, "parameters", "tensors" and "components" are None and "dtypes" is empty.

    Raises:
        UserError: the configuration or a header cannot be read, or a weight file is missing or truncated.
    """
    config = read_object(path / CONFIG)
    files = {name: _size(path / name) for name in _weight_files(path)}
    pickled = any(is_pickle(path / name) for name in files)
    tensors = [] if pickled else [tensor for name in files for tensor in read_header(path / name)]
    dtypes = Counter(tensor.dtype for tensor in tensors)
    return {
        "schema": 1,
        "kind": "checkpoint",
        "path": str(path),
        "model_type": config.get("model_type"),
        "architecture": architecture_of(config),
        "cache_bytes_per_token": _cache_bytes(config),
        "components": None if pickled else _components(tensors),
        "parameters": None if pickled else sum(tensor.elements for tensor in tensors),
        "tensors": None if pickled else len(tensors),
        "dtypes": dict(dtypes.most_common()),
        "bytes": sum(files.values()),
        "files": files,
    }


def read_header(path: Path) -> list[Header]:
    """The tensors of a safetensors file.

    The format: 8 bytes, little endian, the header's length; the header, JSON; the tensors' bytes
    (https://huggingface.co/docs/safetensors).

    Raises:
        UserError: the file is no safetensors, or shorter or longer than its header says.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _MAX_HEADER)))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        places = {
            name: (int(entry["data_offsets"][0]), int(entry["data_offsets"][1])) for name, entry in entries.items()
        }
        tensors = [
            Header(name, str(entry["dtype"]), prod(map(int, entry["shape"])), places[name][1] - places[name][0])
            for name, entry in entries.items()
        ]
        expected = 8 + length + max((end for _, end in places.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is no safetensors file ({error!r}); download it again") from error
    if (found := path.stat().st_size) != expected:
        raise UserError(f"{path} has {found} bytes, its header says {expected}; download it again")
    return tensors


def _size(file: Path) -> int:
    if not file.is_file():
        raise UserError(f"{file} is missing: the checkpoint is incomplete; download it again")
    return file.stat().st_size


def _weight_files(path: Path) -> list[str]:
    for single, index in LAYOUTS:
        if (path / single).is_file():  # where there is an index too, this is the one that counts
            return [single]
        if (path / index).is_file():
            weights = read_object(path / index).get("weight_map")
            names = set(weights.values()) if isinstance(weights, dict) else {None}
            if not all(isinstance(name, str) and Path(name).name == name for name in names):
                raise UserError(f"{path / index} has no weight_map of files beside it; download it again")
            return sorted(map(str, names))
    known = ", ".join(name for layout in LAYOUTS for name in layout)
    raise UserError(f"{path} has no weights, which should be in one of {known}; download the checkpoint again")


def _components(tensors: list[Header]) -> dict[str, int]:
    """Bytes of the tensors by component."""
    found = dict.fromkeys(COMPONENTS, 0)
    for tensor in tensors:
        found[purpose(tensor.name)[0]] += tensor.bytes
    return found


def _cache_bytes(config: dict[str, Any]) -> dict[str, int] | None:
    """What one more token of one row takes in a cache of each precision; None where the configuration does not say.

    What is absent is as transformers has it: a key/value head per head, and heads that share the hidden state.
    """
    found = {name: config.get(key) for name, key in _NUMBERS.items()}
    heads, hidden = found["heads"], found["hidden"]
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        found["kv_heads"] = found["kv_heads"] or heads
        found["head_dim"] = found["head_dim"] or hidden // heads
    layers, kv_heads, width = found["layers"], found["kv_heads"], found["head_dim"]
    if not (isinstance(layers, int) and isinstance(kv_heads, int) and isinstance(width, int)):
        return None
    return {precision: 2 * layers * kv_heads * width * size for precision, size in _CACHES.items()}


def architecture_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture by a `config.json`, as it is written there."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope if isinstance(rope, dict) else {}
    found = {name: config.get(key) for name, key in _NUMBERS.items()}
    found["class"] = ", ".join(map(str, config.get("architectures") or [])) or None
    found["rotary_factor"] = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    found["rope_theta"] = rope.get("rope_theta", config.get("rope_theta"))
    found["rope_type"] = rope.get("rope_type", rope.get("type"))
    return {name: value for name, value in found.items() if value is not None}
