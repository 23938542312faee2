"""transformers' own pipelines over the toy models: the oracle of ours."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from forward_bundles import LABELS, Toy
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput, TokenClassifierOutput


class ToyModel(transformers.PreTrainedModel):
    """What a toy computes, one row at a time, as a model of transformers."""

    config_class = transformers.NemotronConfig

    def __init__(self, config: transformers.NemotronConfig, toy: Toy) -> None:
        super().__init__(config)
        self.toy = toy
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        (ids,) = input_ids.tolist()
        match self.toy.task:
            case "text-classification":
                return SequenceClassifierOutput(logits=torch.tensor(self.toy.logits(ids)[None, -1]))
            case "token-classification":
                return TokenClassifierOutput(logits=torch.tensor(self.toy.logits(ids)[None]))
            case _:
                return BaseModelOutput(last_hidden_state=torch.tensor(self.toy.hidden(ids)[None]))


def transformers_pipeline(toy: Toy, bundle: Path, **arguments: Any) -> Callable[..., Any]:
    """transformers' pipeline of a toy, with the tokenizer that a bundle has."""
    config = {"num_labels": LABELS.get(toy.task, 1), "pad_token_id": toy.pad_token_id} | toy.config
    if "id2label" in config:
        config["id2label"] = {int(number): label for number, label in config["id2label"].items()}
        del config["num_labels"]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(bundle / "tokenizer.json"), unk_token="<unk>")
    model = ToyModel(transformers.NemotronConfig(**config), toy)
    pipeline = transformers.pipeline(toy.task, model=model, tokenizer=tokenizer, device="cpu", **arguments)

    def call(*inputs: Any, **given: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Tokenizer does not support real words")
            return pipeline(*inputs, **given)

    return call


def assert_same(found: Any, expected: Any) -> None:
    """The same shapes, keys and values; numbers within 1e-5, and plain ones."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert_same(found[name], value)
    elif isinstance(expected, list):
        assert isinstance(found, list)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float | np.floating):
        assert type(found) is float
        assert abs(found - expected) < 1e-5
    else:
        assert found == expected
