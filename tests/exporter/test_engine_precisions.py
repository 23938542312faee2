"""Engines of weights below 16 bit, really built by TensorRT-RTX: small, and for no GPU that cannot read them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from refusals import assert_tells, snapshot

from exporter.engine import BuildResult, build
from exporter.engine_options import BuildOptions, resolve_capabilities
from exporter.export import ExportOptions, export
from plugins.tensorrt_network import LENGTHS_ASSUMPTION, SOFTMAX_ASSUMPTION
from runtime.errors import UserError
from runtime.manifest import Manifest

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx (pip install 'nemotron-export[rtx]')")

OPTIONS = BuildOptions("tensorrt-rtx", capabilities=("8.9",))
# Weights of 9 MB in fp16, so that what a plan holds besides them does not matter.
WIDE = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 1,
    "head_dim": 128,
    "vocab_size": 2048,
}

Exported = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, traced: Callable[..., object]) -> Exported:
    """`exported(precision, recipe)`: a bundle that is not gated. Tests must not write into it."""
    place = tmp_path_factory.mktemp("wide")
    checkpoint = write_checkpoint(place / "checkpoint", **WIDE)
    done: dict[tuple[str, str], Path] = {}

    def bundle(precision: str, recipe: str = "") -> Path:
        if (precision, recipe) not in done:
            file, options = place / "mine.toml", ExportOptions(target="tensorrt", precision=precision, verify=False)
            if recipe:
                file.write_text(recipe, encoding="utf-8")
                options = replace(options, recipe=str(file))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("exporter.export.trace", lambda *_, **__: traced(**WIDE)[1])
                done[precision, recipe] = export(checkpoint, place / str(len(done)), options).bundle
        return done[precision, recipe]

    return bundle


def built(bundle: Path, place: Path) -> BuildResult:
    return build(Path(shutil.copytree(bundle, place)), OPTIONS)


BF16 = 'activations = "bf16"\n'


@pytest.mark.parametrize(
    ("precision", "recipe"),
    [
        pytest.param("fp8", "", marks=pytest.mark.slow),
        ("int4", ""),
        *(pytest.param(precision, BF16, marks=pytest.mark.slow) for precision in ("fp8", "int4")),
        pytest.param("int4", "block = 64\n", marks=pytest.mark.slow),
    ],
)
def test_a_plan_saves_what_the_weights_save(precision: str, recipe: str, exported: Exported, tmp_path: Path) -> None:
    """TensorRT may dequantise weights when it builds; then they cost what 16 bit cost, and nothing says so."""
    whole, rounded = exported("fp16"), exported(precision, recipe)
    saved = (whole / "model.onnx.data").stat().st_size - (rounded / "model.onnx.data").stat().st_size
    assert saved > 3e6
    plans = [built(bundle, tmp_path / name).plan_bytes for name, bundle in (("whole", whole), ("rounded", rounded))]
    assert plans[0] - plans[1] > 0.8 * saved  # kernels that dequantise take some of it


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_the_engine_is_recorded_as_the_graph_is_named(precision: str, exported: Exported, tmp_path: Path) -> None:
    result = built(exported(precision), tmp_path / "bundle")
    assert Manifest.load(result.bundle).engines == (result.engine,)
    assert result.engine.precision == precision
    assert result.engine.assumptions == (LENGTHS_ASSUMPTION, SOFTMAX_ASSUMPTION)
    assert (result.layers, result.warnings) == ({"attention": 1, "kv_cache_update": 2, "rotary": 2}, ())


@pytest.mark.parametrize(
    ("precisions", "capability", "named"),
    [
        ({"fp16", "fp8"}, "8.6", ["8.6 lacks fp8, which begins with 8.9", "--precision fp16 or bf16 or int4"]),
        ({"fp16", "int4", "fp8"}, "8.0", ["8.0 lacks fp8", "export without it"]),
        ({"fp16", "int4"}, "7.5", ["7.5 lacks int4, which begins with 8.0", "--precision fp16"]),
        ({"bf16", "int4"}, "7.5", ["7.5 lacks bf16, which begins with 8.0"]),
    ],
)
def test_a_gpu_that_cannot_read_the_weights_is_refused_with_what_it_can(
    precisions: set[str], capability: str, named: list[str]
) -> None:
    with pytest.raises(UserError) as refused:
        resolve_capabilities(trt, replace(OPTIONS, capabilities=("12.0", capability)), precisions)
    assert_tells(refused.value, *named)


@pytest.mark.parametrize(
    ("precisions", "capability"), [({"fp16", "fp8"}, "8.9"), ({"bf16", "int4"}, "8.0"), ({"fp32"}, "7.5")]
)
def test_a_gpu_that_can_is_taken(precisions: set[str], capability: str) -> None:
    options = replace(OPTIONS, capabilities=(capability,))
    assert resolve_capabilities(trt, options, precisions) == (capability,)


@pytest.mark.parametrize("recipe", ["", '[layers]\n"lm_head" = "fp8"\n'])
def test_a_bundle_is_refused_for_what_any_of_its_matrices_is(recipe: str, exported: Exported, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(exported("int4" if recipe else "fp8", recipe), tmp_path / "bundle"))
    before = snapshot(bundle)
    with pytest.raises(UserError, match=r"8\.6 lacks fp8"):
        build(bundle, replace(OPTIONS, capabilities=("8.9", "8.6")))
    assert snapshot(bundle) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "recipe", "capability"),
    [
        *(("int4", recipe, capability) for recipe in ("", BF16) for capability in ("8.0", "8.6", "8.9", "12.0")),
        *(("fp8", recipe, capability) for recipe in ("", BF16) for capability in ("8.9", "12.0")),
    ],
)
def test_what_is_not_refused_builds(
    precision: str, recipe: str, capability: str, exported: Exported, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(exported(precision, recipe), tmp_path / "bundle"))
    assert build(bundle, replace(OPTIONS, capabilities=(capability,), causality="mask")).plan_bytes
    assert build(bundle, replace(OPTIONS, capabilities=(capability,), max_batch_size=4, force=True)).plan_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "capability"), [("fp8", "7.5"), ("fp8", "8.0"), ("fp8", "8.6"), ("int4", "7.5"), ("bf16", "7.5")]
)
def test_what_is_refused_does_not_build(
    precision: str, capability: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT may come to build more than the table says: then the table is to be corrected."""
    monkeypatch.setattr("exporter.engine_options._OLDEST_CAPABILITY", {})
    bundle = Path(shutil.copytree(exported(precision), tmp_path / "bundle"))
    with pytest.raises(UserError, match="HW-specific datatypes"):
        build(bundle, replace(OPTIONS, capabilities=(capability,)))
