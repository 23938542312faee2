"""A random checkpoint of the shape of a large one, with few layers: big tensors at the price of a small model."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TINY = Path(__file__).parents[1] / "artifacts" / "tiny-nemotron"

# Minitron-4B-Base but for the number of layers (it has 32).
MINITRON_4B = {
    "hidden_size": 3072,
    "intermediate_size": 9216,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 256_000,
    "max_position_embeddings": 4096,
    "num_hidden_layers": 2,
    "dtype": "float16",
}


def write_wide_checkpoint(directory: Path, config: Mapping[str, Any] = MINITRON_4B) -> Path:
    """Write a checkpoint of this shape, tensor by tensor; all else is the trained one's, its tokenizer too."""
    from exporter.parameters import expected_shapes
    from exporter.spec import spec_from_config
    from exporter.tasks import GENERATION, TASKS

    directory.mkdir(parents=True)
    for path in TINY.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, directory)
    config = json.loads((TINY / "config.json").read_text()) | dict(config)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = expected_shapes(spec_from_config(config, str(directory)), TASKS[GENERATION])

    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    random = np.random.default_rng(0)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            bits = np.frombuffer(random.bytes(2 * math.prod(shape)), np.uint16)
            # Either sign, any mantissa, one small exponent: 2⁻⁷ ≤ |w| < 2⁻⁶.
            file.write(((bits & 0x83FF) | 0x2000).data)
    return directory
