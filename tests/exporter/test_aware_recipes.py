"""Recipes that choose by a text: what they win on the trained checkpoint, whatever the scale of its channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from divergence import divergence
from rescaled import rescale_channels, rescaled

from exporter.export import ExportOptions, export
from exporter.spec import NemotronSpec
from runtime import load
from runtime.bundle import Bundle
from runtime.errors import CheckFailed
from runtime.manifest import MODEL

pytestmark = pytest.mark.slow

Exported = Callable[..., Bundle]
TARGETS = ("onnxruntime", "tensorrt")


@pytest.fixture(scope="module")
def rescaled_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rescaled(tiny_checkpoint, tmp_path_factory.mktemp("checkpoints") / "rescaled", rescale_channels)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`exported(checkpoint, target, recipe)`: an int4 bundle, made once; all of them are of one trace."""
    from exporter import trace

    place, traced = tmp_path_factory.mktemp("exported"), {}

    def once(spec: NemotronSpec, task: Any, *, cached: bool) -> ir.Model:
        if spec not in traced:
            traced[spec] = trace.trace(spec, task, cached=cached)
        return traced[spec].clone()

    def bundle(checkpoint: Path, target: str, recipe: str) -> Bundle:
        directory = place / f"{checkpoint.name}-{target}-{recipe}"
        if not directory.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("exporter.export.trace", once)
                options = ExportOptions(target=target, precision="int4", recipe=recipe)
                export(checkpoint, directory, options)
        return Bundle.open(directory)

    return bundle


def lost_by_plain(checkpoint: Path, target: str, exported: Exported) -> float:
    """What such channels do to a plain grid; with activations in fp16 nothing finite may come out of it."""
    try:
        return divergence(exported(checkpoint, target, "plain"))
    except CheckFailed:
        return float("inf")


def weight_bytes(bundle: Bundle) -> int:
    return bundle.manifest.files[f"{MODEL}.data"].bytes


@pytest.mark.parametrize("target", TARGETS)
def test_aware_loses_far_less_than_plain_in_as_many_bytes(
    target: str, tiny_checkpoint: Path, exported: Exported
) -> None:
    plain, aware = (exported(tiny_checkpoint, target, recipe) for recipe in ("plain", "aware"))
    assert divergence(aware) < 0.6 * divergence(plain)
    assert weight_bytes(aware) == weight_bytes(plain)


@pytest.mark.parametrize("target", TARGETS)
def test_no_scale_of_a_checkpoints_channels_makes_aware_lose_more(
    target: str, tiny_checkpoint: Path, rescaled_checkpoint: Path, exported: Exported
) -> None:
    assert lost_by_plain(rescaled_checkpoint, target, exported) > 1
    original, other = (exported(checkpoint, target, "aware") for checkpoint in (tiny_checkpoint, rescaled_checkpoint))
    assert divergence(other) < 1.05 * divergence(original)


def test_balanced_is_between_aware_and_int8(tiny_checkpoint: Path, exported: Exported) -> None:
    plain, balanced = (exported(tiny_checkpoint, "onnxruntime", recipe) for recipe in ("plain", "balanced"))
    assert divergence(balanced) < 0.6 * divergence(plain)
    assert balanced.manifest.quantization is not None
    assert balanced.manifest.quantization.matrices == {"int4": 25, "int8": 1}


def test_a_bundle_of_scaled_channels_generates(rescaled_checkpoint: Path, exported: Exported) -> None:
    bundle = exported(rescaled_checkpoint, "onnxruntime", "aware")
    text = load(bundle.path).generate("Once upon a time", max_new_tokens=8).sequences[0]
    assert len(text.token_ids) == 8
