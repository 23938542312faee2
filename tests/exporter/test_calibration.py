"""What goes through a model, layer by layer: what is chosen by it is wrong where it is not what transformers has."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import SMALL, write_checkpoint
from rescaled import Weights, rescaled

from exporter.calibration import RESIDUAL, Calibration, RoundedStream
from exporter.checkpoint import Checkpoint
from exporter.scaling import CONTEXT, DOWN, QKV, UP
from runtime.errors import CheckFailed

PRODUCTS = (QKV, CONTEXT, UP, DOWN)
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one kv head": {"num_key_value_heads": 1, "hidden_act": "relu"},
    "half of a head rotates": {"partial_rotary_factor": 0.5, "hidden_act": "gelu"},
    "tied, stored in bf16": {"tie_word_embeddings": True, "dtype": torch.bfloat16},
    "linear positions": {"rope_parameters": ROPE | {"rope_type": "linear"}},
    "dynamic positions": {"rope_parameters": ROPE | {"rope_type": "dynamic"}},
    "the base model's names": {"architecture": "NemotronModel"},
    "a classifier's": {"architecture": "NemotronForQuestionAnswering"},
}


def windows_of(n: int = 3, length: int = 20) -> np.ndarray:
    return np.random.default_rng(0).integers(SMALL["vocab_size"], size=(n, length))


class Whole:
    """transformers' whole model in fp32 on the same windows, all at once."""

    def __init__(
        self, checkpoint: Path, windows: np.ndarray, weights: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> None:
        architecture = Checkpoint.open(checkpoint).spec.architecture
        model = getattr(transformers, architecture).from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        )
        for name, weight in weights.items():
            model.get_parameter(name).data.copy_(weight)
        base = model.eval().base_model
        self.read: list[dict[str, torch.Tensor]] = [{} for _ in base.layers]
        self.given: list[dict[str, torch.Tensor]] = [{} for _ in base.layers]
        for layer, decoder in enumerate(base.layers):
            for name, module in decoder.named_modules():
                if name and not list(module.children()):
                    module.register_forward_hook(self._note(layer, name))
        with torch.no_grad():
            out = base(torch.from_numpy(windows), use_cache=True, output_hidden_states=True)
        self.cache, self.head_input, self.residual = out.past_key_values, out.last_hidden_state, out.hidden_states

    def _note(self, layer: int, name: str) -> Any:
        def hook(_: Any, read: tuple[torch.Tensor, ...], given: torch.Tensor) -> None:
            self.read[layer][name], self.given[layer][name] = read[0].flatten(0, -2), given.flatten(0, -2)

        return hook


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """But for the order of sums, which differs where rows run together."""
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_each_layer_reads_and_gives_what_transformers_whole_model_has(case: str, tmp_path: Path) -> None:
    checkpoint, windows = write_checkpoint(tmp_path / "small", **CASES[case]), windows_of()
    whole, calibration = Whole(checkpoint, windows), Calibration(Checkpoint.open(checkpoint), windows)
    seen = 0
    for index, layer in enumerate(calibration.layers()):
        assert layer.layer == index
        assert set(layer.inputs) == set(PRODUCTS)
        for name in PRODUCTS:
            same(layer.inputs[name], whole.read[index][name])
        for name in ("self_attn.k_proj", "self_attn.v_proj"):  # calibrated by what queries read
            torch.testing.assert_close(whole.read[index][name], whole.read[index][QKV], rtol=0, atol=0)
        kept = whole.cache.layers[index]
        same(layer.keys, kept.keys.transpose(1, 2).flatten(0, 1))
        same(layer.values, kept.values.transpose(1, 2).flatten(0, 1))
        for name, given in whole.given[index].items():
            same(layer.peaks[name], given.abs().amax(0))
        if index + 1 < SMALL["num_hidden_layers"]:  # the last of transformers' states is behind the final norm
            same(layer.peaks[RESIDUAL], whole.residual[index + 1].abs().amax((0, 1)))
        seen += 1
    assert seen == SMALL["num_hidden_layers"]
    same(calibration.head_input(calibration.hidden), whole.head_input.flatten(0, 1))


def coarse(weight: torch.Tensor) -> torch.Tensor:
    return (weight * 4).round() / 4


@pytest.mark.parametrize("config", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}], ids=str)
def test_what_follows_rounded_matrices_reads_what_transformers_gives_it(config: dict[str, Any], tmp_path: Path) -> None:
    """Each product is asked for when all matrices before it have been rounded, in its layer too."""
    checkpoint, windows = write_checkpoint(tmp_path / "small", **config), windows_of()
    calibration = Calibration(Checkpoint.open(checkpoint), windows)
    stream = RoundedStream(calibration, coarse)
    rounded = {"model.embed_tokens.weight": coarse(Checkpoint.open(checkpoint).read("model.embed_tokens.weight"))}
    read: list[dict[str, torch.Tensor]] = []
    exact = Whole(checkpoint, windows)
    readers = {QKV: ("q", "k", "v"), CONTEXT: ("o",), UP: ("up",), DOWN: ("down",)}
    for index, layer in enumerate(calibration.layers()):
        same(layer.inputs[DOWN], exact.read[index][DOWN])  # the exact ones stay what they are
        read.append({})
        for product, short in readers.items():
            read[index][product] = stream.inputs(layer.module, product)
            for name in short:
                inner = f"{product.split('.')[0]}.{name}_proj.weight"
                layer.weights[inner].copy_(coarse(layer.weights[inner]))
                rounded[f"model.layers.{index}.{inner}"] = layer.weights[inner].clone()
        stream.advance(layer.module)
    whole = Whole(checkpoint, windows, rounded)
    for index, inputs in enumerate(read):
        for product in PRODUCTS:
            same(inputs[product], whole.read[index][product])
            assert not torch.allclose(inputs[product], exact.read[index][product], atol=1e-2)
    same(calibration.head_input(stream.hidden), whole.head_input.flatten(0, 1))
    same(calibration.head_input(calibration.hidden), exact.head_input.flatten(0, 1))


def test_windows_know_nothing_of_each_other(small_checkpoint: Path) -> None:
    windows, opened = windows_of(), Checkpoint.open(small_checkpoint)
    together = list(Calibration(opened, windows).layers())
    for row, window in enumerate(windows):
        for layer, alone in zip(together, Calibration(opened, window[None]).layers(), strict=True):
            part = slice(row * len(window), (row + 1) * len(window))
            for name in PRODUCTS:
                torch.testing.assert_close(layer.inputs[name][part], alone.inputs[name], rtol=0, atol=0)
            torch.testing.assert_close(layer.values[part], alone.values, rtol=0, atol=0)


def test_a_layer_is_read_when_it_is_asked_for_and_is_gone_when_the_next_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose weights do not fit in memory in fp32 can be calibrated: one layer's do."""
    read: list[str] = []
    original = Checkpoint.read

    def noted(self: Checkpoint, name: str) -> torch.Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(Checkpoint, "read", noted)
    checkpoint = write_checkpoint(tmp_path / "deep", num_hidden_layers=4, dtype=torch.bfloat16)
    layers = Calibration(Checkpoint.open(checkpoint), windows_of()).layers()
    assert read == ["model.embed_tokens.weight"]
    before: list[weakref.ref[torch.Tensor]] = []
    for index in range(4):
        read.clear()
        layer = next(layers)
        assert len(read) == len(set(read)) == len(layer.weights)
        assert all(name.startswith(f"model.layers.{index}.") for name in read)
        assert not any(reference() is not None for reference in before)
        before = [weakref.ref(tensor) for tensor in (*layer.weights.values(), *layer.inputs.values())]
        del layer


def test_the_checkpoints_weights_come_with_the_layer_as_they_are(small_checkpoint: Path) -> None:
    opened = Checkpoint.open(small_checkpoint)
    for layer in Calibration(opened, windows_of()).layers():
        for name, weight in layer.weights.items():
            assert torch.equal(weight, opened.read(f"model.layers.{layer.layer}.{name}"))


def test_a_checkpoint_that_is_not_finite_in_fp32_is_named(small_checkpoint: Path, tmp_path: Path) -> None:
    def break_second(weights: Weights) -> None:
        weights.tensors["model.layers.1.mlp.down_proj.weight"] *= 1e38

    checkpoint = rescaled(small_checkpoint, tmp_path / "broken", break_second)
    layers = Calibration(Checkpoint.open(checkpoint), windows_of()).layers()
    next(layers)
    with pytest.raises(CheckFailed, match="layer 1 is not finite in fp32 on the calibration text"):
        next(layers)
