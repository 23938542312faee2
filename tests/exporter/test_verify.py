"""The gate lets right exports pass and stops wrong ones; what it stored stops them where they are deployed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import corruptions
import numpy as np
import onnx
import pytest
import torch
from checkpoints import write_checkpoint

from exporter.export import ExportOptions, export
from exporter.verify import LIMIT, verify
from runtime import load
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden, selftest
from runtime.manifest import Manifest


def test_the_trained_checkpoint_passes_every_case_at_the_fixed_limit(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    parity = verify(tiny_bundle, tiny_checkpoint)
    assert parity.passed
    cases = {(comparison.name, comparison.case) for comparison in parity.comparisons}
    assert cases == {
        ("logits", "prefill"),
        ("logits", "chunk"),
        ("logits", "decode"),
        ("logits", "end of capacity"),
        ("present", "decode"),
        ("present", "end of capacity"),
        ("greedy", "all"),
    }
    assert {comparison.limit for comparison in parity.comparisons if comparison.name != "greedy"} == {LIMIT}
    assert parity == Manifest.load(tiny_bundle).parity


@pytest.mark.parametrize("bug", corruptions.ALL, ids=lambda bug: bug.__name__)
def test_a_wrong_graph_fails_the_gate_and_wherever_it_is_loaded(
    bug: Callable[[onnx.ModelProto], None], tiny_bundle_copy: Path, tiny_checkpoint: Path
) -> None:
    corruptions.corrupt(tiny_bundle_copy, bug)
    assert not verify(tiny_bundle_copy, tiny_checkpoint).passed
    assert not selftest(tiny_bundle_copy).passed
    with pytest.raises(CheckFailed, match="is not the exported model"):
        load(tiny_bundle_copy)


def test_rewriting_a_bundle_unchanged_still_passes(tiny_bundle_copy: Path, tiny_checkpoint: Path) -> None:
    """Otherwise the tests above could fail for how they write and not for what."""
    corruptions.corrupt(tiny_bundle_copy, lambda model: None)
    assert verify(tiny_bundle_copy, tiny_checkpoint).passed
    assert selftest(tiny_bundle_copy).passed


def test_golden_cases_are_the_references_and_small(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    from transformers import NemotronForCausalLM

    assert (tiny_bundle / "golden.npz").stat().st_size < 1_000_000
    golden = Golden.load(tiny_bundle / "golden.npz")
    assert [step.case for step in golden.steps] == ["prefill", "chunk", *["decode"] * 4]
    prefill = golden.steps[0]
    assert len(set(prefill.lengths.tolist())) == 3
    assert golden.capacity > prefill.tokens.shape[1]
    model = NemotronForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    row = prefill.tokens[1][: prefill.lengths[1]]
    with torch.no_grad():
        logits = model(torch.tensor(row[None])).logits[0, -1].numpy()
    np.testing.assert_allclose(prefill.top_logits[1, -1], np.sort(logits)[::-1][:16], atol=1e-5)
    assert prefill.top_ids[1, -1, 0] == logits.argmax()


def test_a_model_whose_reference_is_itself_inexact_gets_a_limit_to_match(tmp_path: Path) -> None:
    """Logits in the thousands: transformers in fp32 is further than 1e-4 from fp64, and so may we be."""
    checkpoint = write_checkpoint(tmp_path / "loud", num_hidden_layers=1)
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] *= 1000
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    result = export(checkpoint, tmp_path / "bundle", ExportOptions())
    logits = [c for c in result.manifest.parity.comparisons if c.name == "logits"]
    assert all(c.passed and LIMIT < c.limit < 0.1 for c in logits)


@pytest.mark.slow
@pytest.mark.parametrize("max_length", [3, 11])
def test_the_gate_fits_models_of_very_short_context(tmp_path: Path, max_length: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "short", num_hidden_layers=1, max_position_embeddings=max_length)
    result = export(checkpoint, tmp_path / "bundle", ExportOptions())
    assert result.manifest.parity.passed
    assert selftest(result.bundle).passed


def test_a_checkpoint_of_another_shape_is_named_and_not_compared(tiny_bundle: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"are not of one model: .* \(4, 2, 64, 2048\) and \(1, 2, 32, 97\)"):
        verify(tiny_bundle, other)


def test_another_models_weights_of_the_same_shape_do_not_pass(tiny_bundle: Path, tmp_path: Path) -> None:
    import json

    config = json.loads((Path(__file__).parents[2] / "artifacts/tiny-nemotron/config.json").read_text())
    keys = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "head_dim",
        "vocab_size",
        "max_position_embeddings",
    )
    other = write_checkpoint(tmp_path / "other", **{key: config[key] for key in keys})
    assert not verify(tiny_bundle, other).passed


VARIANTS: dict[str, dict[str, Any]] = {
    "a key/value head per query head, all channels rotate": {"num_key_value_heads": 4, "partial_rotary_factor": 1.0},
    "one key/value head, biases": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "heads wider than the hidden state": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64},
    "tied, another activation, another epsilon": {"tie_word_embeddings": True, "hidden_act": "silu", "norm_eps": 1e-2},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "linear, another base": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 500.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_random_checkpoints_of_other_structures_pass(
    tmp_path: Path, config: dict[str, Any], dtype: torch.dtype
) -> None:
    checkpoint = write_checkpoint(tmp_path / "random", dtype=dtype, **config)
    parity = export(checkpoint, tmp_path / "bundle", ExportOptions()).manifest.parity
    assert {comparison.limit for comparison in parity.comparisons if comparison.name != "greedy"} == {LIMIT}
