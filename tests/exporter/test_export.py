"""The spine: what a bundle holds, and that it is right and whole or not there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors_files as by_hand
import torch
from checkpoints import SMALL, write_checkpoint
from onnx import numpy_helper
from refusals import assert_tells, snapshot

from exporter.export import ExportOptions, export
from runtime.bundle import Bundle, sha256_of
from runtime.errors import UserError

ROOT = Path(__file__).parents[2]
NORM = "model.norm.weight"
STAGES = ("trace", "passes", "weights", "verify")
UNCHECKED = ExportOptions(verify=False)


def weights_of(bundle: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(bundle / "model.onnx").graph.initializer}


def without_manifest(bundle: Path) -> dict[str, bytes | None]:
    return {name: content for name, content in snapshot(bundle).items() if name != "manifest.json"}


# What a bundle holds


def test_the_manifest_has_the_fields_that_other_programs_read(tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    assert list(manifest) == [
        *("schema", "tool", "created", "source", "task", "target", "precision", "opset", "max_length", "graph"),
        *("step_bytes", "passes", "lowering", "parity", "engines", "files"),  # and quality, where it was measured
    ]
    assert manifest["schema"] == 1
    assert re.fullmatch(r"nemotron-export \d+\.\d+\.\d+", manifest["tool"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", manifest["created"])
    assert set(manifest["source"]) == {"name", "fingerprint"}
    assert (manifest["task"], manifest["target"], manifest["precision"]) == ("text-generation", "onnxruntime", "fp32")
    assert manifest["max_length"] == 512
    assert set(manifest["graph"]) == {"inputs", "outputs"}
    for tensor in (*manifest["graph"]["inputs"], *manifest["graph"]["outputs"]):
        assert set(tensor) == {"name", "dtype", "shape"}
    assert all(set(record) == {"name", "count"} for record in manifest["passes"])
    assert {"name": "fuse_partial_rope_attention", "count": 4} in manifest["passes"]
    assert {"name": "fold_layernorm1p", "count": 9} in manifest["passes"]
    assert manifest["lowering"] == {"attention": "GroupQueryAttention", "fallbacks": []}
    assert set(manifest["parity"]) == {"evaluated_by", "passed", "comparisons"}
    assert re.fullmatch(r"onnxruntime-cpu \d+\.\d+\.\d+", manifest["parity"]["evaluated_by"])
    assert manifest["parity"]["passed"] is True
    for comparison in manifest["parity"]["comparisons"]:
        assert set(comparison) == {"name", "case", "metric", "value", "limit", "passed"}
    assert manifest["engines"] == []
    assert all(set(record) == {"sha256", "bytes"} for record in manifest["files"].values())


def test_the_manifest_names_every_file_as_it_is(tiny_bundle: Path) -> None:
    files = json.loads((tiny_bundle / "manifest.json").read_text())["files"]
    assert set(files) == {
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("model.onnx", "model.onnx.data", "golden.npz", "genai_config.json"),
    }
    assert {path.name for path in tiny_bundle.iterdir()} == {*files, "manifest.json"}
    for name, record in files.items():
        assert record == {"sha256": sha256_of(tiny_bundle / name), "bytes": (tiny_bundle / name).stat().st_size}


def test_the_manifest_describes_the_graph_that_is_there(tiny_bundle: Path) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    model = onnx.load(tiny_bundle / "model.onnx", load_external_data=False)
    assert manifest["opset"] == {entry.domain: entry.version for entry in model.opset_import}[""] == 21

    def described(values: Any) -> list[dict[str, Any]]:
        types = {onnx.TensorProto.INT64: "int64", onnx.TensorProto.FLOAT: "float32"}
        return [
            {
                "name": value.name,
                "dtype": types[value.type.tensor_type.elem_type],
                "shape": [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
            }
            for value in values
        ]

    assert manifest["graph"] == {"inputs": described(model.graph.input), "outputs": described(model.graph.output)}


def test_the_names_onnxruntime_genai_is_told_are_the_graphs(tiny_bundle: Path) -> None:
    decoder = json.loads((tiny_bundle / "genai_config.json").read_text())["model"]["decoder"]
    model = onnx.load(tiny_bundle / decoder["filename"], load_external_data=False)
    for told, values in ((decoder["inputs"], model.graph.input), (decoder["outputs"], model.graph.output)):
        names = {value.name for value in values}
        assert {name.replace("%d", "3") for name in told.values()} <= names
    assert "past_key_values.4.key" not in {value.name for value in model.graph.input}


def test_norms_hold_their_stored_weight_and_one_in_fp32(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    stored, found = by_hand.values(tiny_checkpoint), weights_of(tiny_bundle)
    norms = [name for name in stored if "norm" in name and name.endswith(".weight")]
    assert len(norms) == 9
    lost = 0.0
    for name in norms:
        expected = stored[name].astype(np.float64) + 1
        np.testing.assert_array_equal(found[f"{name}.plus_one"], expected.astype(np.float32))
        in_bf16 = (torch.from_numpy(stored[name]).bfloat16() + 1).double().numpy()
        lost = max(lost, float(np.abs(in_bf16 - expected).max()))
    assert lost > 1e-3  # so adding it in the checkpoint's own precision would have been noticed


def test_every_other_weight_is_the_checkpoints_value_for_value(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    stored, found = by_hand.values(tiny_checkpoint), weights_of(tiny_bundle)
    for name, values in stored.items():
        if "norm" in name and name.endswith(".weight"):
            continue
        matrix = (
            values.ndim == 2 and name != "model.embed_tokens.weight"
        )  # Linear keeps [out, in], MatMul takes [in, out]
        exported = found[f"{name}.transposed"].T if matrix else found[name]
        np.testing.assert_array_equal(exported, values, err_msg=name)


def test_the_source_is_recorded_so_that_it_can_be_told_apart(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    tensors = by_hand.read(tiny_checkpoint / "model.safetensors")
    source = json.loads((tiny_bundle / "manifest.json").read_text())["source"]
    assert source == {"name": "tiny-nemotron", "fingerprint": by_hand.fingerprint(tensors, tensors)}


def test_no_path_of_the_exporting_machine_is_in_the_bundle(tiny_bundle: Path) -> None:
    paths = {str(ROOT), str(tiny_bundle.parent), sys.prefix, str(Path.home()), str(Path(torch.__file__).parent)}
    searched = [path.encode() for path in paths if len(path) > 1] + [b"site-packages", b"/exporter/", b".partial"]
    for file in tiny_bundle.iterdir():
        content = file.read_bytes()
        assert [path for path in searched if path in content] == [], file.name


def test_a_second_export_gives_the_same_bytes(tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    code = (
        "import sys; from pathlib import Path; from exporter.export import ExportOptions, export; "
        "export(Path(sys.argv[1]), Path(sys.argv[2]), ExportOptions(verify=False))"
    )
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # sets and dictionaries in another order
    subprocess.run(
        [sys.executable, "-c", code, tiny_checkpoint, again],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    first = without_manifest(tiny_bundle)
    del first["golden.npz"]  # the gate's
    assert without_manifest(again) == first


def test_the_export_does_not_touch_the_checkpoint(quick, small_copy: Path, tmp_path: Path) -> None:
    before = snapshot(small_copy)
    export(small_copy, tmp_path / "bundle", ExportOptions())
    assert snapshot(small_copy) == before


def test_a_sharded_checkpoint_gives_the_bundle_of_a_single_file(quick, small_checkpoint, small_copy, tmp_path) -> None:
    by_hand.shard(small_copy, 3)
    single = export(small_checkpoint, tmp_path / "single", ExportOptions())
    sharded = export(small_copy, tmp_path / "sharded", ExportOptions())
    assert without_manifest(sharded.bundle).keys() == without_manifest(single.bundle).keys()
    for name in ("model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"):
        assert (sharded.bundle / name).read_bytes() == (single.bundle / name).read_bytes(), name
    assert sharded.manifest.source.fingerprint == single.manifest.source.fingerprint


def test_one_changed_element_is_another_source(quick, small_copy: Path, old: Path, tmp_path: Path) -> None:
    file = small_copy / "model.safetensors"
    tensors = by_hand.read(file)
    dtype, shape, content = tensors[NORM]
    by_hand.write(file, tensors | {NORM: (dtype, shape, bytes([content[0] ^ 1]) + content[1:])})
    changed = export(small_copy, tmp_path / "changed", UNCHECKED).manifest
    assert changed.source.fingerprint != Bundle.open(old).manifest.source.fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_checkpoint_passes_the_gate(quick, tmp_path: Path, dtype: torch.dtype) -> None:
    checkpoint = write_checkpoint(tmp_path / "c", dtype=dtype)
    kept = {stored[0] for stored in by_hand.read(checkpoint / "model.safetensors").values()}
    assert kept == {{torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]}
    result = export(checkpoint, tmp_path / "b", ExportOptions())
    assert result.manifest.parity is not None
    assert result.manifest.parity.passed
    stored = by_hand.values(checkpoint)[NORM]
    np.testing.assert_array_equal(weights_of(result.bundle)[f"{NORM}.plus_one"], stored + np.float32(1))


@pytest.mark.slow
def test_tied_embeddings_are_the_head_too(quick, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    stored = by_hand.values(checkpoint)
    assert "lm_head.weight" not in stored
    result = export(checkpoint, tmp_path / "b", ExportOptions())
    assert result.manifest.parity is not None
    assert result.manifest.parity.passed
    tables = [w for w in weights_of(result.bundle).values() if SMALL["vocab_size"] in w.shape]
    assert sorted(table.shape for table in tables) == [(64, 97), (97, 64)]
    for table in tables:
        np.testing.assert_array_equal(table if len(table) == 97 else table.T, stored["model.embed_tokens.weight"])


def test_without_the_gate_there_is_nothing_that_claims_a_check(old: Path) -> None:
    assert not (old / "golden.npz").exists()
    manifest = json.loads((old / "manifest.json").read_text())
    assert "parity" not in manifest
    assert "golden.npz" not in manifest["files"]


# Options


@pytest.mark.parametrize("asked", [None, 1, 10, 64])
def test_the_capacity_is_what_was_asked_and_else_the_models(quick, small_checkpoint, tmp_path, asked) -> None:
    result = export(small_checkpoint, tmp_path / "b", ExportOptions(max_length=asked))
    expected = asked or SMALL["max_position_embeddings"]
    assert result.manifest.max_length == expected
    assert weights_of(result.bundle)["rope.cos"].shape == (expected, 8)
    genai = json.loads((result.bundle / "genai_config.json").read_text())
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == expected
    assert result.manifest.parity is not None
    assert result.manifest.parity.passed


@pytest.mark.parametrize("asked", [0, -1, 65])
def test_a_capacity_that_the_model_does_not_have_is_refused(untraced, small_checkpoint, tmp_path, asked) -> None:
    with pytest.raises(UserError) as refused:
        export(small_checkpoint, tmp_path / "b", ExportOptions(max_length=asked))
    assert_tells(refused.value, "--max-length", "1..64", asked)


@pytest.mark.parametrize(
    ("name", "value", "known"),
    [("task", "poetry", "text-generation"), ("target", "abacus", "onnxruntime"), ("precision", "fp12", "fp32")],
)
def test_an_unknown_option_is_refused_with_the_known(untraced, small_checkpoint, tmp_path, name, value, known) -> None:
    with pytest.raises(UserError) as refused:
        export(small_checkpoint, tmp_path / "b", ExportOptions(**{name: value}))
    assert_tells(refused.value, name, repr(value), known)


def test_the_bundle_goes_to_artifacts_under_the_checkpoints_name(
    quick, small_checkpoint, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = export(small_checkpoint, None, UNCHECKED)
    assert result.bundle == Path("artifacts/small-onnxruntime-fp32")
    assert Bundle.open(tmp_path / result.bundle).manifest == result.manifest


def test_the_result_tells_what_contracts_promise(quick, small_checkpoint: Path, tmp_path: Path) -> None:
    result = export(small_checkpoint, tmp_path / "b", ExportOptions()).to_json()
    assert list(result) == ["schema", "bundle", "seconds", "peak_rss_mb", "manifest"]
    assert list(result["seconds"]) == list(STAGES)
    assert all(seconds >= 0 for seconds in result["seconds"].values())
    assert 50 < result["peak_rss_mb"] < 100_000  # MB, whatever unit the system counts in
    assert result["manifest"] == json.loads((tmp_path / "b" / "manifest.json").read_text())
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("verify", [True, False])
def test_progress_reaches_the_end_of_every_stage_in_order(quick, small_checkpoint, tmp_path, verify: bool) -> None:
    seen: list[tuple[str, int, int]] = []
    export(small_checkpoint, tmp_path / "b", ExportOptions(verify=verify), lambda *step: seen.append(step))
    order = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert order == [*(STAGES if verify else STAGES[:-1])]
    for stage in order:
        steps = [(done, total) for name, done, total in seen if name == stage]
        assert all(0 <= done <= total for done, total in steps)
        assert steps[-1][0] == steps[-1][1]
        shares = [done / total for done, total in steps]
        assert shares == sorted(shares)
    weights = [(done, total) for stage, done, total in seen if stage == "weights" and total != 1]
    stored = by_hand.values(small_checkpoint)
    assert {total for _, total in weights} == {4 * sum(values.size for values in stored.values())}
    assert weights[-1][0] == weights[-1][1]
