"""A model that lm-eval's own transformers backend runs, and requests as its tasks make them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval_tasks import write_tasks
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="session")
def oracle(tiny_checkpoint: Path) -> HFLM:
    """The trained checkpoint in fp32, as lm-eval runs it on transformers; its cache of logits is off."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    # The cache takes a continuation's first token for its last where two queries share all but the place of the cut.
    return HFLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(tiny_checkpoint), batch_size=1, logits_cache=False
    )


@pytest.fixture(scope="session")
def tiny_tasks(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A directory for --include-path. Tests must not write into it."""
    return write_tasks(tmp_path_factory.mktemp("tasks"), tiny_checkpoint / "heldout.txt")


@pytest.fixture
def requests() -> Callable[..., list[Instance]]:
    """`requests("loglikelihood", (context, continuation), …)`."""

    def made(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
        return [Instance(kind, {}, each, number, ("test", number, 1)) for number, each in enumerate(arguments)]

    return made
