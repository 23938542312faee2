"""safetensors files read and written by hand: eight bytes of header length, the header in JSON, the tensors' bytes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

Stored = tuple[str, list[int], bytes]  # dtype, shape, content


def read(path: Path) -> dict[str, Stored]:
    """Every tensor of a file by its name."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    data = content[8 + length :]
    return {name: (t["dtype"], t["shape"], data[slice(*t["data_offsets"])]) for name, t in header.items()}


def write(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a file with these tensors, one after the other."""
    header, at = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        at += len(content)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(content for _, _, content in tensors.values()))


def shard(directory: Path, count: int) -> None:
    """Turn a checkpoint's single file into `count` shards with an index."""
    tensors = read(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[number::count]}
        write(directory / name, part)
        weight_map.update(dict.fromkeys(part, name))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def float32(tensor: Stored) -> np.ndarray:
    """The values of an F32, F16 or BF16 tensor, exactly."""
    dtype, shape, content = tensor
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(content, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32).reshape(shape)


def values(checkpoint: Path) -> dict[str, np.ndarray]:
    """The values of every tensor of a single-file checkpoint."""
    return {name: float32(tensor) for name, tensor in read(checkpoint / "model.safetensors").items()}


def from_float32(array: np.ndarray, dtype: str = "F32") -> Stored:
    """A tensor to write; BF16 by cutting off the lower half."""
    array = np.asarray(array, np.float32)
    if dtype == "BF16":
        return dtype, list(array.shape), (array.view(np.uint32) >> 16).astype("<u2").tobytes()
    return dtype, list(array.shape), array.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def fingerprint(tensors: Mapping[str, Stored], names: Iterable[str]) -> str:
    """What the manifest records of these tensors: sha256 over the sorted sha256 of name, dtype, shape and bytes."""
    digests = []
    for name in names:
        dtype, shape, content = tensors[name]
        digests.append(hashlib.sha256(f"{name} {dtype} {shape} ".encode() + content).hexdigest())
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
