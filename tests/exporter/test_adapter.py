"""A LoRA adapter is merged as `peft` merges it, and nothing but LoRA is taken for it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import write_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from refusals import assert_tells
from safetensors.torch import load_file, save_file
from transformers import NemotronForCausalLM

from exporter.checkpoint import Checkpoint
from exporter.export import ExportOptions, export
from runtime.errors import UserError
from runtime.manifest import Manifest

# Of peft, which asks transformers for it under the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["up_proj", "down_proj"]
QUERY = "model.layers.0.self_attn.q_proj"
A, B = f"base_model.model.{QUERY}.lora_A.weight", f"base_model.model.{QUERY}.lora_B.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def train(
    base: Path, directory: Path, *, dtype: torch.dtype = torch.float32, bins: bool = False, **config: Any
) -> Path:
    """Save an adapter for a checkpoint with peft, its tensors random as if it had been trained."""
    model = get_peft_model(_model(base), LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that embeddings are saved too, and the name of the model is no repository
        model.to(dtype).save_pretrained(str(directory), safe_serialization=not bins)
    return directory


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(_model(base), str(adapter))
    merged: NemotronForCausalLM = model.merge_and_unload()
    return dict(merged.state_dict())


def _model(base: Path) -> NemotronForCausalLM:
    return NemotronForCausalLM.from_pretrained(base, dtype=torch.float32)


def rewrite(directory: Path, changes: dict[str, torch.Tensor | None]) -> None:
    tensors = {**load_file(directory / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / WEIGHTS)


def reconfigure(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **changes}))


def refusal(base: Path, adapter: Path) -> UserError:
    with pytest.raises(UserError) as refused:
        Checkpoint.open(base, adapter)
    return refused.value


@pytest.fixture
def adapter(small_checkpoint: Path, tmp_path: Path) -> Path:
    """An adapter for the small checkpoint, of its queries alone."""
    return train(small_checkpoint, tmp_path / "adapter", r=4, target_modules=["q_proj"])


CONFIGS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "lora_alpha": 16, "target_modules": ATTENTION},
    "mlp": {"r": 3, "lora_alpha": 5, "target_modules": MLP},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": [*ATTENTION, *MLP]},
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "one layer": {"r": 2, "target_modules": ATTENTION, "layers_to_transform": [1]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [*ATTENTION, *MLP],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {r"model.layers.\d+.self_attn.v_proj": 3, "down_proj": 1},
    },
    "patterns with rslora": {
        "target_modules": MLP,
        "use_rslora": True,
        "rank_pattern": {"^model.layers.0.mlp.up_proj": 5},
    },
    "head and embedding": {"r": 4, "target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    "saved modules": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]},
    "saved embedding": {"r": 4, "target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("bins", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_merged_weights_are_those_that_peft_merges(
    small_checkpoint: Path, tmp_path: Path, config: dict[str, Any], bins: bool
) -> None:
    directory = train(small_checkpoint, tmp_path / "adapter", bins=bins, **config)
    assert (directory / WEIGHTS).exists() is not bins
    theirs = merged_by_peft(small_checkpoint, directory)
    checkpoint, base = Checkpoint.open(small_checkpoint, directory), Checkpoint.open(small_checkpoint)
    changed = set()
    for name in checkpoint.tensors:
        tensor, original = checkpoint.read(name), base.read(name)
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-6)
        if not torch.equal(tensor, original):
            changed.add(name)
    assert changed
    assert changed == checkpoint.adapted


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_checkpoint_and_adapter_are_merged_in_fp32(tmp_path: Path, stored: torch.dtype) -> None:
    base = write_checkpoint(tmp_path / "base", dtype=stored)
    directory = train(base, tmp_path / "adapter", dtype=stored, r=4, target_modules=["q_proj"])
    theirs = _model(base).state_dict()[f"{QUERY}.weight"]
    parts = load_file(directory / WEIGHTS)
    expected = theirs.double() + 2 * (parts[B].double() @ parts[A].double())  # lora_alpha 8, r 4
    checkpoint = Checkpoint.open(base, directory)
    merged = checkpoint.read(f"{QUERY}.weight")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged.double(), expected, rtol=0, atol=1e-6)
    assert checkpoint.read("model.layers.0.self_attn.k_proj.weight").dtype == stored


def test_merging_leaves_the_checkpoint_s_file_as_it_was(small_copy: Path, adapter: Path) -> None:
    before = (small_copy / "model.safetensors").read_bytes()
    checkpoint = Checkpoint.open(small_copy, adapter)
    first, second = (checkpoint.read(f"{QUERY}.weight") for _ in range(2))
    assert torch.equal(first, second)
    assert (small_copy / "model.safetensors").read_bytes() == before


def fingerprint(base: Path, adapter: Path | None) -> str:
    checkpoint = Checkpoint.open(base, adapter)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    return checkpoint.fingerprint()


def test_the_fingerprint_covers_the_adapter_s_tensors_and_scaling(small_checkpoint: Path, adapter: Path) -> None:
    found = [fingerprint(small_checkpoint, None), fingerprint(small_checkpoint, adapter)]
    assert fingerprint(small_checkpoint, adapter) == found[1]
    reconfigure(adapter, lora_alpha=9)
    found.append(fingerprint(small_checkpoint, adapter))
    rewrite(adapter, {A: load_file(adapter / WEIGHTS)[A] + 1})
    found.append(fingerprint(small_checkpoint, adapter))
    assert len(set(found)) == 4


def test_a_bundle_holds_the_merged_weights_and_the_adapter_s_name(
    small_checkpoint: Path, adapter: Path, tmp_path: Path, quick: None
) -> None:
    bundle = tmp_path / "bundle"
    export(small_checkpoint, bundle, ExportOptions(adapter=adapter, verify=False))
    source = Manifest.load(bundle).source
    assert (source.name, source.adapter) == ("small", "adapter")
    assert source.fingerprint == fingerprint(small_checkpoint, adapter)
    merged = merged_by_peft(small_checkpoint, adapter)[f"{QUERY}.weight"]
    assert _stored(bundle, merged.shape) == pytest.approx(merged.numpy(), abs=1e-6)


def _stored(bundle: Path, shape: torch.Size) -> Any:
    import onnx_ir as ir

    model = ir.load(bundle / "model.onnx")
    found = [value for name, value in model.graph.initializers.items() if name.startswith(f"{QUERY}.weight")]
    assert len(found) == 1
    assert found[0].const_value is not None
    array = found[0].const_value.numpy()
    return array.T if found[0].name != f"{QUERY}.weight" else array


def test_an_adapter_within_the_bundle_that_force_would_delete_is_refused(
    small_checkpoint: Path, adapter: Path, old: Path, untraced: None
) -> None:
    place = adapter.rename(old / "adapter")
    with pytest.raises(UserError) as refused:
        export(small_checkpoint, old, ExportOptions(adapter=place, verify=False, force=True))
    assert_tells(refused.value, place, "--force would delete")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": None}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"a_feature_of_tomorrow": {"x": 1}}, "a_feature_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"r": 0}, "r should be an integer above 0"),
        ({"r": True}, "r should be an integer above 0"),
        ({"lora_alpha": "much"}, "lora_alpha should be a number"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern.q_proj"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern should map"),
        ({"alpha_pattern": {"(": 1}}, "'('"),
        ({"modules_to_save": "lm_head"}, "modules_to_save should be a list"),
    ],
    ids=str,
)
def test_what_is_more_than_lora_is_refused_by_name(
    small_checkpoint: Path, adapter: Path, changes: dict[str, Any], words: str
) -> None:
    reconfigure(adapter, **changes)
    assert_tells(refusal(small_checkpoint, adapter), adapter / CONFIG, words)


def another_variant() -> dict[str, torch.Tensor | None]:
    return {f"base_model.model.{QUERY}.lora_magnitude_vector.weight": torch.ones(128)}


def no_prefix() -> dict[str, torch.Tensor | None]:
    return {f"{QUERY}.lora_A.weight": torch.ones(4, 64)}


def no_place() -> dict[str, torch.Tensor | None]:
    name = "base_model.model.model.layers.7.self_attn.q_proj"
    return {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(128, 4)}


def no_partner() -> dict[str, torch.Tensor | None]:
    return {B: None}


def other_width() -> dict[str, torch.Tensor | None]:
    return {A: torch.ones(4, 65)}


def other_rank() -> dict[str, torch.Tensor | None]:
    return {A: torch.ones(5, 64), B: torch.ones(128, 5)}


def other_shape_of_a_whole_tensor() -> dict[str, torch.Tensor | None]:
    return {"base_model.model.lm_head.weight": torch.ones(98, 64)}


def two_for_one() -> dict[str, torch.Tensor | None]:
    name = "base_model.model.lm_head"
    return {f"{name}.weight": torch.ones(97, 64), f"{name}.base_layer.weight": torch.ones(97, 64)}


def of_a_vector() -> dict[str, torch.Tensor | None]:
    name = "base_model.model.model.norm"
    return {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(64, 4)}


def integers() -> dict[str, torch.Tensor | None]:
    return {A: torch.ones(4, 64, dtype=torch.int8)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (another_variant, "lora_magnitude_vector"),
        (no_prefix, f"{QUERY}.lora_A.weight"),
        (no_place, "model.layers.7.self_attn.q_proj"),
        (no_partner, "lora_B"),
        (other_width, "[4, 65]"),
        (other_rank, "[5, 64]"),
        (other_shape_of_a_whole_tensor, "[98, 64]"),
        (two_for_one, "lm_head.base_layer.weight"),
        (of_a_vector, "no matrix"),
        (integers, "I8"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_tensor_without_a_place_or_of_a_wrong_shape_is_refused(
    small_checkpoint: Path, adapter: Path, changes: Callable[[], dict[str, torch.Tensor | None]], words: str
) -> None:
    rewrite(adapter, changes())
    assert_tells(refusal(small_checkpoint, adapter), adapter / WEIGHTS, words)


def test_a_saved_module_that_is_listed_and_not_there_is_refused(small_checkpoint: Path, adapter: Path) -> None:
    reconfigure(adapter, modules_to_save=["lm_head"])
    assert_tells(refusal(small_checkpoint, adapter), adapter / WEIGHTS, "lm_head", "modules_to_save")


def test_an_adapter_without_tensors_is_refused_rather_than_merged_as_nothing(
    small_checkpoint: Path, adapter: Path
) -> None:
    save_file({}, adapter / WEIGHTS)
    assert_tells(refusal(small_checkpoint, adapter), adapter / WEIGHTS, "holds no tensor")


def test_an_adapter_of_a_shared_embedding_is_refused(tmp_path: Path, adapter: Path) -> None:
    tied = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    assert f"{QUERY}.weight" in Checkpoint.open(tied, adapter).adapted
    rewrite(adapter, {"base_model.model.model.embed_tokens.weight": torch.ones(97, 64)})
    assert_tells(refusal(tied, adapter), adapter / WEIGHTS, "embed_tokens", "tie_word_embeddings")


def test_a_directory_that_is_no_adapter_is_refused(small_checkpoint: Path, adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    assert_tells(refusal(small_checkpoint, adapter), adapter, WEIGHTS, "adapter_model.bin")
    (adapter / CONFIG).unlink()
    assert_tells(refusal(small_checkpoint, adapter), adapter, CONFIG)


def test_an_adapter_that_is_not_finite_is_refused_by_name(small_checkpoint: Path, adapter: Path) -> None:
    for value, name in ((torch.nan, A), (3e38, "fp32")):
        rewrite(adapter, {A: torch.full((4, 64), value), B: torch.full((128, 4), 3e38)})
        checkpoint = Checkpoint.open(small_checkpoint, adapter)
        with pytest.raises(UserError) as refused:
            checkpoint.read(f"{QUERY}.weight")
        assert_tells(refused.value, adapter, name)


def test_a_pickled_adapter_never_runs_its_code(small_checkpoint: Path, adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    torch.save({A: print}, adapter / "adapter_model.bin")
    assert_tells(
        refusal(small_checkpoint, adapter), adapter / "adapter_model.bin", "holds more than tensors", "could run code"
    )
