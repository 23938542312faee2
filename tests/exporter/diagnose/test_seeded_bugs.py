"""Who has a wrong bundle is told the right layer and the right bug; who has a right one is told nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import corruptions
import numpy as np
import onnx
import pytest
import seeded_bugs
from checkpoints import write_checkpoint
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from seeded_bugs import Bug

from exporter.checkpoint import Checkpoint
from exporter.diagnose.report import Report
from exporter.diagnose.run import diagnose
from exporter.export import ExportOptions, export
from exporter.verify_rows import prompts
from runtime.bundle import Bundle

Bundles = Callable[[str], Path]


def diagnosed(bundle: Path, checkpoint: Path, *, network: bool = False) -> Report:
    opened = Bundle.open(bundle)
    row = prompts(opened)[0][: opened.manifest.max_length]
    return diagnose(opened, Checkpoint.open(checkpoint), row, network=network)


def check(report: Report, bug: Bug) -> None:
    first = report.findings[0]
    assert (first.place, first.proof and first.proof.cause) == (bug.place, bug.cause)
    assert first.proof is not None
    assert first.proof.after < 0.1  # in limits: agreement is no matter of taste
    assert first.proof.before > 100


@pytest.mark.parametrize("bug", seeded_bugs.ALL, ids=lambda bug: bug.name)
def test_the_layer_and_the_bug_are_named(bug: Bug, tiny_bundle_copy: Path, tiny_checkpoint: Path) -> None:
    corruptions.corrupt(tiny_bundle_copy, bug.corrupt)
    assert not corruptions.passes_gate(tiny_bundle_copy, tiny_checkpoint)
    check(diagnosed(tiny_bundle_copy, tiny_checkpoint), bug)


@pytest.mark.slow
@pytest.mark.parametrize("bug", seeded_bugs.ALL, ids=lambda bug: bug.name)
def test_so_they_are_in_graphs_for_tensorrt(
    bug: Bug, tensorrt_bundle_of: Bundles, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tensorrt_bundle_of("fp32"), tmp_path / "copy"))
    corruptions.corrupt(copy, bug.corrupt)
    assert not corruptions.passes_gate(copy, tiny_checkpoint)
    check(diagnosed(copy, tiny_checkpoint), bug)


# The evaluation knows no interleaved rotation; mending sets the lengths anew.
OF_NETWORKS = [bug for bug in seeded_bugs.ALL if bug.name not in {"interleaved_rotation", "causal_off_by_one"}]
QUICK = ("one_dropped_in_one_layer", "rotary_width", "attention_scale")


@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, id=bug.name, marks=[] if bug.name in QUICK else pytest.mark.slow) for bug in OF_NETWORKS],
)
def test_so_they_are_in_tensorrts_network_without_a_gpu(
    bug: Bug, tensorrt_bundle_of: Bundles, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    copy = Path(shutil.copytree(tensorrt_bundle_of("fp32"), tmp_path / "copy"))
    corruptions.corrupt(copy, bug.corrupt)
    report = diagnosed(copy, tiny_checkpoint, network=True)
    assert "network" in report.evaluated_by
    check(report, bug)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    "bug", [bug for bug in seeded_bugs.ALL if bug.place == "layer 2" or "scale" in bug.name], ids=lambda bug: bug.name
)
def test_in_16_bit_the_layer_is_named_too(
    bug: Bug, precision: str, tensorrt_bundle_of: Bundles, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tensorrt_bundle_of(precision), tmp_path / "copy"))
    corruptions.corrupt(copy, bug.corrupt)
    first = diagnosed(copy, tiny_checkpoint).findings[0]
    assert (first.place, first.proof and first.proof.cause) == (bug.place, bug.cause)


@pytest.mark.parametrize(
    "kind",
    [
        *("fp32", "tensorrt fp32 network"),
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("int8 cache", "tensorrt fp32", "tensorrt fp16", "tensorrt bf16")
        ),
    ],
)
def test_a_right_export_gets_no_finding(
    kind: str, tiny_bundle: Path, int8_cache_bundle: Path, tensorrt_bundle_of: Bundles, tiny_checkpoint: Path
) -> None:
    network = kind.endswith("network")
    if network:
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    own = {"fp32": tiny_bundle, "int8 cache": int8_cache_bundle}
    report = diagnosed(own.get(kind) or tensorrt_bundle_of(kind.split()[1]), tiny_checkpoint, network=network)
    assert report.passed
    assert [stage.name for stage in report.stages] == [
        *("embedding", *(f"layer {layer}" for layer in range(4)), "final norm", "logits"),
    ]
    room = 0.2 if "fp32" in kind else 0.9
    assert all(s.alone is not None and s.alone.max_abs <= room * (s.alone.limit or 0) for s in report.stages)


VARIANTS = {
    "biases, one key/value head": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    "all channels rotate": {"num_key_value_heads": 4, "partial_rotary_factor": 1.0},
    "tied, another activation": {"tie_word_embeddings": True, "hidden_act": "silu", "norm_eps": 1e-2},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "three positions": {"max_position_embeddings": 3},
    "one position": {"max_position_embeddings": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_right_exports_of_other_structures_get_none_either(
    config: dict[str, object], target: str, tmp_path: Path
) -> None:
    checkpoint = write_checkpoint(tmp_path / "random", **config)
    bundle = export(checkpoint, tmp_path / "bundle", ExportOptions(target=target, verify=False)).bundle
    assert diagnosed(bundle, checkpoint).passed


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_right_exports_of_lower_precisions_get_none_either(
    precision: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    bundle = export(tiny_checkpoint, tmp_path / "b", ExportOptions(precision=precision, verify=False)).bundle
    assert diagnosed(bundle, tiny_checkpoint).passed


def test_a_bug_that_no_hypothesis_knows_is_placed_and_not_explained(
    tiny_bundle_copy: Path, tiny_checkpoint: Path
) -> None:
    def shake(model: onnx.ModelProto) -> None:
        name = "model.layers.2.mlp.down_proj.weight.transposed"
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        matrix = numpy_helper.to_array(tensor)
        noise = np.random.default_rng(0).standard_normal(matrix.shape).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(matrix + 0.01 * noise, name))

    corruptions.corrupt(tiny_bundle_copy, shake)
    (finding,) = diagnosed(tiny_bundle_copy, tiny_checkpoint).findings
    assert (finding.place, finding.tap, finding.proof) == ("layer 2", "MLP output", None)
    assert finding.told() == "layer 2, MLP output: no known cause explains it"


def test_one_wrong_weight_is_named_with_both_values(tiny_bundle_copy: Path, tiny_checkpoint: Path) -> None:
    def change(model: onnx.ModelProto) -> None:
        name = "model.layers.3.self_attn.o_proj.weight.transposed"
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
        matrix = np.array(numpy_helper.to_array(tensor))
        matrix[7, 11] = 1.5
        tensor.CopyFrom(numpy_helper.from_array(matrix, name))

    corruptions.corrupt(tiny_bundle_copy, change)
    stored = load_file(tiny_checkpoint / "model.safetensors")["model.layers.3.self_attn.o_proj.weight"][11, 7]
    (finding,) = diagnosed(tiny_bundle_copy, tiny_checkpoint).findings
    assert finding.told() == (
        "layer 3, attention output: self_attn.o_proj.weight[11, 7] is 1.5 "
        f"where the checkpoint has {float(stored):.4g}"
    )  # fmt: skip


def test_what_overflows_fp16_says_what_it_reaches(tmp_path: Path, quick: None) -> None:
    checkpoint = write_checkpoint(tmp_path / "hot")
    tensors = load_file(checkpoint / "model.safetensors")
    for name in tensors:
        if "up_proj" in name:
            tensors[name] *= 256
        if "down_proj" in name:
            tensors[name] /= 256**2
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    options = ExportOptions(target="tensorrt", precision="fp16", verify=False, fp16_safe=False)
    first = diagnosed(export(checkpoint, tmp_path / "bundle", options).bundle, checkpoint).findings[0]
    assert (first.place, first.tap, first.proof and first.proof.cause) == ("layer 0", "MLP hidden", "overflow")
    assert "the largest number of its type is 6.55e+04" in first.told()
