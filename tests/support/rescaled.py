"""Checkpoints of the same function whose channels are of other sizes, and texts for checkpoints of random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Tensor = torch.Tensor


class Weights:
    """A checkpoint's tensors in fp32, and the changes that leave its function as it is."""

    def __init__(self, directory: Path) -> None:
        self.tensors: dict[str, Tensor] = {
            name: tensor.float() for name, tensor in load_file(directory / "model.safetensors").items()
        }
        self.config: dict[str, Any] = json.loads((directory / "config.json").read_text())

    def each_layer(self) -> Iterable[str]:
        return (f"model.layers.{layer}." for layer in range(self.config["num_hidden_layers"]))

    def scale_norm(self, norm: str, readers: Iterable[str], factor: Tensor) -> None:
        """What a norm gives [hidden], smaller by the factor, and the readers' columns larger."""
        self.tensors[f"{norm}.weight"] = (self.tensors[f"{norm}.weight"] + 1) / factor - 1  # LayerNorm1P
        self.tensors[f"{norm}.bias"] = self.tensors[f"{norm}.bias"] / factor
        for name in readers:
            self.tensors[f"{name}.weight"] = self.tensors[f"{name}.weight"] * factor

    def scale_values(self, prefix: str, factor: Tensor) -> None:
        """Values [kv_heads · head_dim] larger by the factor; o_proj reads each once for every query head."""
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        read = factor.reshape(kv_heads, -1).repeat_interleave(heads // kv_heads, 0).flatten()
        values, out = f"{prefix}self_attn.v_proj.weight", f"{prefix}self_attn.o_proj.weight"
        self.tensors[values] = self.tensors[values] * factor[:, None]
        self.tensors[out] = self.tensors[out] / read

    def scale_squares(self, prefix: str, factor: Tensor, degree: int = 2) -> None:
        """What relu to this power is of [intermediate], larger by the factor, and what it gives by its power."""
        up, down = f"{prefix}mlp.up_proj.weight", f"{prefix}mlp.down_proj.weight"
        self.tensors[up] = self.tensors[up] * factor[:, None]
        self.tensors[down] = self.tensors[down] / factor**degree


def rescaled(source: Path, destination: Path, change: Callable[[Weights], None]) -> Path:
    """A copy of a checkpoint in fp32 whose weights are changed."""
    shutil.copytree(source, destination)
    weights = Weights(source)
    change(weights)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.tensors.items()}, destination / "model.safetensors"
    )
    (destination / "config.json").write_text(json.dumps(weights.config | {"dtype": "float32"}))
    return destination


def rescale_channels(weights: Weights, most: int = 10) -> None:
    """Channels of random sizes, up to 2^most larger or smaller: of norms, values, what is squared, and the head."""
    hidden, wide = weights.config["hidden_size"], weights.config["intermediate_size"]
    values = weights.config["num_key_value_heads"] * weights.config["head_dim"]
    for seed, prefix in enumerate(weights.each_layer()):
        norm, qkv = f"{prefix}input_layernorm", [f"{prefix}self_attn.{name}_proj" for name in "qkv"]
        weights.scale_norm(norm, qkv, powers_of_two(hidden, -most, most, 10 * seed))
        norm, up = f"{prefix}post_attention_layernorm", [f"{prefix}mlp.up_proj"]
        weights.scale_norm(norm, up, powers_of_two(hidden, -most, most, 10 * seed + 1))
        weights.scale_values(prefix, powers_of_two(values, -most, most, 10 * seed + 2))
        weights.scale_squares(prefix, powers_of_two(wide, -most // 2, most // 2, 10 * seed + 3))
    weights.scale_norm("model.norm", ["lm_head"], powers_of_two(hidden, -most, most, 99))


def powers_of_two(size: int, least: int, most: int, seed: int) -> Tensor:
    exponents = torch.randint(least, most + 1, (size,), generator=torch.Generator().manual_seed(seed))
    return exponents.float().exp2()


def write_texts(checkpoint: Path, vocab: int, tokens: int = 1024) -> None:
    """Texts of random words of `checkpoints.write_tokenizer`: what the packaged ones are to it is one word."""
    for seed, name in enumerate(("calibration.txt", "heldout.txt")):
        ids = np.random.default_rng(seed).integers(3, vocab, tokens)
        (checkpoint / name).write_text(" ".join(f"t{token}" for token in ids), encoding="utf-8")
