"""The weights that the measurement of drafts copies with, against transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import NemotronForCausalLM

from benchmarks.make_checkpoint import config_of, write_checkpoint
from benchmarks.requests import CIRCLE, make_copying, requests_of


def test_weights_that_copy_go_round_in_the_circle_that_their_prompt_has_been_through(tmp_path: Path) -> None:
    config = config_of("242m", hidden_size=256, intermediate_size=512, num_hidden_layers=4, vocab_size=2048)
    make_copying(write_checkpoint(tmp_path / "random", config, "bfloat16"), tmp_path / "copying")
    model = NemotronForCausalLM.from_pretrained(tmp_path / "copying", dtype=torch.float32)
    with torch.no_grad():
        said = model(torch.tensor([CIRCLE])).logits[0]
    most = said.topk(2)
    assert most.indices[:, 0].tolist() == [*CIRCLE[1:], CIRCLE[0]]
    assert (most.values[:, 0] - most.values[:, 1]).min() > 1  # far from a tie, which kernels would break differently


def test_requests_are_as_long_as_they_are_said_to_be_and_come_in_order() -> None:
    asked = requests_of(vocab=1000)
    assert len(asked) == 16
    assert all(20 <= len(one.prompt) <= 600 and 10 <= one.count <= 200 for one in asked)
    assert [one.arrival for one in asked] == sorted(one.arrival for one in asked)
    assert asked[0].arrival == 0
