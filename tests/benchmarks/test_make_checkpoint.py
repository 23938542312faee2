"""Checkpoints for measurements: a shape alone is not enough where tokens are to be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import NemotronForCausalLM

from benchmarks.make_checkpoint import PRESETS, config_of, write_checkpoint
from exporter.export import ExportOptions, export

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 2048,
}
PROMPTS = [[1, 5, 17, 99], [1, 5, 18, 99], [300, 2, 7, 8]]


@pytest.fixture(scope="module", params=["bfloat16", "float16", "float32"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("made") / "checkpoint"
    return write_checkpoint(place, config_of("242m", **SMALL), request.param, shard_bytes=300_000)


def test_greedy_tokens_follow_from_the_context_and_fp16_holds_them(written: Path) -> None:
    model = NemotronForCausalLM.from_pretrained(written, dtype=torch.float16)
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        assert bool(torch.isfinite(model(ids).logits).all())
        rows.append(model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 4:])
    assert len({tuple(row.tolist()) for row in rows}) == len(PROMPTS)
    assert all(len(set(row.tolist())) > 1 for row in rows)  # random models end in loops: here, of three or more
    assert len({token for row in rows for token in row.tolist()}) > 24


def test_norms_are_not_at_their_start(written: Path) -> None:
    weights = dict(NemotronForCausalLM.from_pretrained(written, dtype=torch.float32).named_parameters())
    for name in (name for name in weights if "norm" in name):
        assert 0.1 < float(weights[name].detach().abs().mean()) < 0.4


def test_shards_are_listed_and_none_is_larger_than_asked_but_for_one_tensor(written: Path) -> None:
    index = json.loads((written / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(path.name for path in written.glob("*.safetensors"))
    assert len(files) > 1
    held = {}
    for name in files:
        with safe_open(written / name, "pt") as shard:
            tensors = {key: shard.get_tensor(key) for key in shard.keys()}  # noqa: SIM118
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 300_000
        held |= {key: (name, tensor.nbytes) for key, tensor in tensors.items()}
    assert {key: name for key, (name, _) in held.items()} == index["weight_map"]
    assert sum(size for _, size in held.values()) == index["metadata"]["total_size"]


@pytest.mark.slow
def test_it_is_exported_as_any_other(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", config_of("242m", **SMALL))
    result = export(checkpoint, tmp_path / "b", ExportOptions())
    assert result.manifest.parity is not None
    assert result.manifest.parity.passed


@pytest.mark.parametrize(("preset", "billions"), [("242m", 0.242), ("minitron-4b", 4.2), ("nemotron-4-340b", 341)])
def test_presets_have_the_parameters_that_they_are_named_by(preset: str, billions: float) -> None:
    from exporter.parameters import expected_shapes
    from exporter.spec import spec_from_config
    from exporter.tasks import GENERATION, TASKS

    shapes = expected_shapes(spec_from_config(config_of(preset), preset), TASKS[GENERATION])
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count / 1e9 == pytest.approx(billions, rel=0.02)
    assert preset in PRESETS
