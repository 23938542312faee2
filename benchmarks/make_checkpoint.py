"""Random checkpoints of the shapes of real ones: what an export costs does not depend on what the weights say.

    python -m benchmarks.make_checkpoint --preset minitron-4b DIRECTORY [--layers N] [--dtype bfloat16]

Written tensor by tensor in bounded memory, in shards of at most 5 GB with an index, as real ones are. Norms are not at
their start (LayerNorm1P stores its weight minus one), and matrices keep activations in the range of fp16: greedy tokens
follow from the context. Tokenizer and texts are the trained checkpoint's; its ids are within every vocabulary here.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

EMBEDDING = "model.embed_tokens.weight"
TINY = Path(__file__).parents[1] / "artifacts" / "tiny-nemotron"
SHARD_BYTES = 5_000_000_000
_CHUNK = 1 << 24  # values that are made at a time
_NORM_STD = 0.2


def _shape(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, head_dim: int, vocab: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "242m": _shape(16, 1024, 4096, 16, 4, 64, 32_000),  # of nobody: 241.8 million parameters
    # config.json of nvidia/Minitron-4B-Base.
    "minitron-4b": _shape(32, 3072, 9216, 24, 8, 128, 256_000),
    # Width, heads and MLP by the model card of nvidia/Minitron-8B-Base; layers, groups and head_dim as its sister's.
    "minitron-8b": _shape(32, 4096, 16_384, 48, 8, 128, 256_000),
    # config.json of mgoin/nemotron-3-8b-chat-4k-sft-hf and thhaus/nemotron3-8b: a key/value head per query head.
    "nemotron-3-8b": _shape(32, 4096, 16_384, 32, 32, 128, 256_000),
    # config.json of mgoin/Nemotron-4-340B-Base-hf.
    "nemotron-4-340b": _shape(96, 18_432, 73_728, 96, 8, 192, 256_000),
}


@dataclass(frozen=True)
class _Format:
    """A float's bits: sign and mantissa, where the exponent begins, and its bias."""

    name: str
    bits: type[np.unsignedinteger[Any]]
    drawn: int
    shift: int
    bias: int

    @property
    def bytes(self) -> int:
        return np.dtype(self.bits).itemsize


_FORMATS = {
    "bfloat16": _Format("BF16", np.uint16, 0x807F, 7, 127),
    "float16": _Format("F16", np.uint16, 0x83FF, 10, 15),
    "float32": _Format("F32", np.uint32, 0x807FFFFF, 23, 127),
}


def config_of(preset: str, **changes: Any) -> dict[str, Any]:
    """The `config.json` of a preset: the trained checkpoint's, with this shape."""
    trained: dict[str, Any] = json.loads((TINY / "config.json").read_text(encoding="utf-8"))
    return trained | PRESETS[preset] | changes


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], dtype: str = "bfloat16", shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write a checkpoint of text generation with this `config.json`."""
    from exporter.parameters import expected_shapes
    from exporter.spec import spec_from_config
    from exporter.tasks import GENERATION, TASKS

    directory.mkdir(parents=True)
    for path in TINY.iterdir():
        if path.suffix not in {".safetensors", ".md"}:
            shutil.copy(path, directory)
    config = dict(config) | {"dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shapes = expected_shapes(spec_from_config(config, str(directory)), TASKS[GENERATION])
    layout, random = _FORMATS[dtype], np.random.Generator(np.random.SFC64(0))
    shards = _shards(shapes, layout, shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
        total = sum(layout.bytes * math.prod(shape) for shape in shapes.values())
        index = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (directory / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    for file, shard in zip(names, shards, strict=True):
        _write_shard(directory / file, {name: shapes[name] for name in shard}, layout, random)
    return directory


def _shards(shapes: Mapping[str, tuple[int, ...]], layout: _Format, most: int) -> list[list[str]]:
    """Names in order, cut where a shard would take more than `most` bytes."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = layout.bytes * math.prod(shape)
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], layout: _Format, random: np.random.Generator
) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        size = layout.bytes * math.prod(shape)
        header[name] = {"dtype": layout.name, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for values in _values(math.prod(shape), _std(name, shape), layout, random):
                file.write(values.data)


def _std(name: str, shape: tuple[int, ...]) -> float:
    """A matrix keeps the deviation of what it is given; an embedding is as large as what layers add to it."""
    if len(shape) == 1:
        return _NORM_STD
    return 1.0 if name == EMBEDDING else float(shape[1] ** -0.5)


def _values(
    left: int, std: float, layout: _Format, random: np.random.Generator
) -> Iterator[NDArray[np.unsignedinteger[Any]]]:
    """`left` values in pieces: either sign, any mantissa, one exponent, 2^e ≤ |w| < 2^(e + 1).

    Their deviation is √(7/3) · 2^e, the nearest of these to `std`.
    """
    exponent = round(math.log2(std / math.sqrt(7 / 3))) + layout.bias << layout.shift
    while left:
        count = min(left, _CHUNK)
        words = random.integers(0, 2**64, -(-count * layout.bytes // 8), np.uint64)
        values = words.view(layout.bits)[:count]
        values &= layout.bits(layout.drawn)
        values |= layout.bits(exponent)
        yield values
        left -= count


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint and say how fast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--dtype", choices=_FORMATS, default="bfloat16")
    given = parser.parse_args(arguments)
    changes = {} if given.layers is None else {"num_hidden_layers": given.layers}
    started = time.perf_counter()
    write_checkpoint(given.directory, config_of(given.preset, **changes), given.dtype)
    seconds = time.perf_counter() - started
    size = sum(path.stat().st_size for path in given.directory.glob("*.safetensors"))
    print(f"{given.directory}: {size / 1e9:.2f} GB in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
