"""Random Nemotron checkpoints in Hugging Face layout, small and by no means trivial: norms are not at their start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import NemotronConfig

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_checkpoint(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    architecture: str = "NemotronForCausalLM",
    **config: Any,
) -> Path:
    """Write a random checkpoint with a tokenizer of one word per id; `config` goes over SMALL."""
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(NemotronConfig(**{**SMALL, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if "norm" in name or "bias" in name else parameter.shape[-1] ** -0.5)
    model.to(dtype).save_pretrained(directory)
    write_tokenizer(directory, model.config.vocab_size)
    return directory


def write_tokenizer(directory: Path, vocab: int) -> None:
    """A tokenizer.json whose words are `t0`, `t1`, …"""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
