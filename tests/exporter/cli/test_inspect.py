from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path
from xml.etree import ElementTree

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch

ROOT = Path(__file__).parents[3]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of two shards with numbers that are easy to count."""
    import numpy as np

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nemotron", "num_hidden_layers": 3}))
    save_file({"a": np.zeros((2, 3), np.float32)}, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file({"b": np.zeros(4, np.float16), "c": np.zeros((), np.float32)}, tmp_path / "two.safetensors")
    places = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return tmp_path


def test_a_bundle_tells_where_it_came_from_and_what_was_checked(cli, tiny_bundle):
    outcome = cli("inspect", tiny_bundle)
    assert (outcome.code, outcome.err) == (0, "")
    for words in (
        "tiny-nemotron", "text-generation", "onnxruntime, fp32", "512 tokens", "fuse_partial_rope_attention ×4",
        "GroupQueryAttention", "passed on onnxruntime-cpu", "prefill ×1", "model.onnx.data", "4.1 kB per token",
    ):  # fmt: skip
        assert words in outcome.out


def test_a_bundle_tells_its_architecture_layers_precision_and_sizes(cli, tiny_bundle):
    out = " ".join(cli("inspect", tiny_bundle).out.split())
    for words in (
        "NemotronForCausalLM, 4 layers, hidden 256, MLP 1024, relu2, 4 heads, 2 key/value heads, head_dim 64, rotary",
        "layers 0–2 LayerNormalization", "as 0–2, and GatherND (tokens whose logits are asked for) ×2",
        "GroupQueryAttention (4 heads on 2, rotary of 32 channels, cache update inside)", "MatMul ×6, Add ×2",
        "q_proj, k_proj, v_proj, o_proj fp32 ×16", "mlp 8.4 MB 52.9 %", "padding ",
    ):  # fmt: skip
        assert words in out
    report = json.loads(cli("inspect", tiny_bundle, "--json").out)
    assert sum(report["components"].values()) == (tiny_bundle / "model.onnx.data").stat().st_size
    assert report["architecture"]["class"] == "NemotronForCausalLM"


def test_an_engine_tells_what_it_was_built_for(cli, machine):
    out = cli("inspect", machine.path).out
    for words in (
        "engines/tensorrt-11.4.0.1-sm89/model.plan", "tensorrt 11.4.0.1", "compute capability 8.9",
        "batch 3, input 6, capacity 48",
    ):  # fmt: skip
        assert words in out


@pytest.mark.slow
def test_a_checked_bundle_below_fp32_tells_what_it_lost(cli, int8_cache_bundle):
    quality = json.loads((int8_cache_bundle / "manifest.json").read_text())["quality"]
    assert f"perplexity {quality['perplexity']:.4f}" in cli("inspect", int8_cache_bundle).out


def test_without_onnx_the_manifest_is_shown_and_what_is_left_out_is_told(cli, tiny_bundle, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    outcome = cli("inspect", tiny_bundle)
    assert outcome.code == 0
    assert "4.1 kB per token" in outcome.out
    assert (
        "layers, precision and sizes by component are left out: onnx is not installed; pip install onnx" in outcome.err
    )
    report = json.loads(cli("inspect", tiny_bundle, "--json").out)
    assert (report["layers"], report["precision"], report["components"]) == (None, None, None)
    outcome = cli("inspect", tiny_bundle, "--graph", tmp_path / "layer.svg")
    assert (outcome.code, outcome.out) == (2, "")
    assert "error: onnx is not installed; pip install onnx" in outcome.err
    assert not (tmp_path / "layer.svg").exists()


def test_a_layer_is_drawn_to_a_file(cli, tiny_bundle, tmp_path):
    outcome = cli("inspect", tiny_bundle, "--graph", tmp_path / "layer.svg", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["kind"] == "bundle"
    assert outcome.err == f"drawn to {tmp_path / 'layer.svg'}\n"
    assert ElementTree.parse(tmp_path / "layer.svg").getroot().tag.endswith("svg")


@pytest.mark.parametrize(("name", "words"), [("layer.png", "ends in .svg"), ("nowhere/layer.svg", "that is there")])
def test_a_picture_that_cannot_be_is_refused(cli, tiny_bundle, tmp_path, name, words):
    outcome = cli("inspect", tiny_bundle, "--graph", tmp_path / name)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"error: cannot draw to {tmp_path / name}; give a file" in outcome.err
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(tmp_path.glob("*.*g"))


def test_a_checkpoint_is_not_drawn_and_the_way_to_a_bundle_is_told(cli, tiny_checkpoint, tmp_path):
    outcome = cli("inspect", tiny_checkpoint, "--graph", tmp_path / "layer.svg")
    assert (outcome.code, outcome.out) == (2, "")
    assert f"nemotron-export export {tiny_checkpoint} BUNDLE writes one" in outcome.err


def test_a_graph_that_is_damaged_is_named(cli, tiny_bundle_copy):
    (tiny_bundle_copy / "model.onnx").write_bytes(b"\xff" * (tiny_bundle_copy / "model.onnx").stat().st_size)
    outcome = cli("inspect", tiny_bundle_copy)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"error: {tiny_bundle_copy / 'model.onnx'} is no ONNX graph" in outcome.err
    assert outcome.err.count("\n") == 1


def test_it_answers_within_a_second(tiny_bundle):
    """Of the processor: what else the machine does is not the program's."""
    command = (
        "from exporter.cli import run; import sys, time; run(sys.argv[1:]); print(time.process_time(), file=sys.stderr)"
    )

    def seconds() -> float:
        arguments = [sys.executable, "-c", command, "inspect", str(tiny_bundle)]
        outcome = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, timeout=300, check=True)
        return float(outcome.stderr.splitlines()[-1])

    assert min(seconds() for _ in range(3)) < 1


def test_a_rounded_cache_tells_what_a_token_takes_and_what_it_was_calibrated_on(cli, int8_cache_bundle):
    assert "1.0 kB per token, 524.3 kB per full row (int8)" in cli("inspect", int8_cache_bundle).out
    assert "kv cache by 16384 tokens of calibration.txt" in cli("inspect", int8_cache_bundle).out
    report = json.loads(cli("inspect", int8_cache_bundle, "--json").out)
    assert report["cache_bytes_per_token"] == 4 * 2 * 2 * 64
    assert report["manifest"]["kv_cache"] == "int8"


def test_the_json_of_a_bundle_carries_its_manifest(cli, tiny_bundle):
    report = json.loads(cli("inspect", tiny_bundle, "--json").out)
    assert (report["schema"], report["kind"]) == (1, "bundle")
    assert report["manifest"] == json.loads((tiny_bundle / "manifest.json").read_text())
    assert report["cache_bytes_per_token"] == 4 * 2 * 2 * 64 * 4  # layers, key and value, kv_heads, head_dim, fp32
    assert report["bytes"] == sum(f.stat().st_size for f in tiny_bundle.iterdir() if f.name != "manifest.json")
    assert report["golden"]["cases"][0] == "prefill"


def test_a_bundle_that_was_not_checked_says_so(cli, tiny_bundle_copy):
    path = tiny_bundle_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["parity"], manifest["files"]["golden.npz"]
    path.write_text(json.dumps(manifest))
    out = cli("inspect", tiny_bundle_copy).out
    assert "not checked (exported with --no-verify)" in out
    assert json.loads(cli("inspect", tiny_bundle_copy, "--json").out)["golden"] is None


def test_a_checkpoint_tells_its_architecture_and_size(cli, tiny_checkpoint):
    report = json.loads(cli("inspect", tiny_checkpoint, "--json").out)
    with safe_open(tiny_checkpoint / "model.safetensors", framework="np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - not a mapping
    assert (report["schema"], report["kind"], report["model_type"]) == (1, "checkpoint", "nemotron")
    assert (report["tensors"], report["parameters"]) == (len(shapes), sum(map(prod, shapes)))
    assert report["dtypes"] == {"BF16": len(shapes)}
    assert report["bytes"] == (tiny_checkpoint / "model.safetensors").stat().st_size
    assert report["architecture"]["layers"] == 4
    assert report["architecture"]["rotary_factor"] == 0.5
    assert report["cache_bytes_per_token"] == {"fp32": 4096, "fp16": 2048, "bf16": 2048, "int8": 1024}
    out = cli("inspect", tiny_checkpoint).out
    for words in ("kv heads", "4.1 kB (fp32), 2.0 kB (fp16)", "mlp        4.2 MB  53.3 %"):
        assert words in out


def test_the_components_of_a_checkpoint_are_its_tensors(cli, tiny_checkpoint):
    found = json.loads(cli("inspect", tiny_checkpoint, "--json").out)["components"]
    tensors = {name: tensor.nbytes for name, tensor in load_torch(tiny_checkpoint / "model.safetensors").items()}
    assert sum(found.values()) == sum(tensors.values())
    assert found["attention"] == sum(size for name, size in tensors.items() if "self_attn" in name)
    assert found["norms"] == sum(size for name, size in tensors.items() if "norm" in name)
    assert found["head"] == tensors["lm_head.weight"]


def test_of_a_configuration_that_leaves_much_to_transformers_the_cache_is_what_transformers_makes(cli, checkpoint):
    from transformers import NemotronConfig

    given = {"num_hidden_layers": 3, "hidden_size": 96, "num_attention_heads": 6}
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "nemotron", **given}))
    heads = NemotronConfig(**given, num_key_value_heads=6)
    numbers = 2 * 3 * 6 * heads.head_dim
    report = json.loads(cli("inspect", checkpoint, "--json").out)
    assert report["cache_bytes_per_token"]["fp16"] == 2 * numbers


def test_the_shards_of_a_checkpoint_are_added_up(cli, checkpoint):
    report = json.loads(cli("inspect", checkpoint, "--json").out)
    assert (report["tensors"], report["parameters"], len(report["files"])) == (3, 6 + 4 + 1, 2)
    assert report["dtypes"] == {"F32": 2, "F16": 1}
    assert report["architecture"] == {"layers": 3}


def test_a_model_of_another_architecture_is_shown_with_a_warning(cli, checkpoint):
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama"}))
    outcome = cli("inspect", checkpoint)
    assert outcome.code == 0
    assert "only 'nemotron' can be exported" in outcome.err


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "is missing"),
        (_truncate, "its header says"),
        (lambda file: file.write_bytes(b""), "no safetensors file"),
        (lambda file: file.write_bytes(b"\xff" * 64), "no safetensors file"),
        (lambda file: file.write_bytes((2).to_bytes(8, "little") + b"[]"), "no safetensors file"),
        (lambda file: file.write_bytes((9).to_bytes(8, "little") + b'{"a":"b"}'), "no safetensors file"),
        (lambda file: file.write_bytes((2).to_bytes(8, "little") + b"{}more"), "its header says 10"),
    ],
)
def test_a_damaged_shard_is_named(cli, checkpoint, damage, words):
    damage(checkpoint / "two.safetensors")
    outcome = cli("inspect", checkpoint)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"error: {checkpoint / 'two.safetensors'}" in outcome.err
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", "should hold a JSON object"),
        ("model.safetensors.index.json", "{}", "no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../elsewhere"}}', "no weight_map"),
    ],
)
def test_a_damaged_description_is_named(cli, checkpoint, file, text, words):
    (checkpoint / file).write_text(text)
    outcome = cli("inspect", checkpoint)
    assert outcome.code == 2
    assert str(checkpoint / file) in outcome.err
    assert words in outcome.err


def test_what_is_neither_bundle_nor_checkpoint_says_what_it_lacks(cli, tmp_path):
    assert "does not exist" in cli("inspect", tmp_path / "nothing").err
    assert "it has no manifest.json" in cli("inspect", tmp_path).err
    (tmp_path / "config.json").write_text("{}")
    outcome = cli("inspect", tmp_path)
    assert outcome.code == 2
    assert "one of model.safetensors, model.safetensors.index.json, pytorch_model.bin" in outcome.err


def test_of_pickles_files_and_sizes_are_shown_and_no_parameters_counted(cli, checkpoint):
    (checkpoint / "model.safetensors.index.json").unlink()
    for number in (1, 2):
        (checkpoint / f"{number}.bin").write_bytes(b"PK" * 500 * number)
    places = {"a": "1.bin", "b": "2.bin"}
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    report = json.loads(cli("inspect", checkpoint, "--json").out)
    assert report["files"] == {"1.bin": 1000, "2.bin": 2000}
    assert (report["bytes"], report["parameters"], report["tensors"], report["dtypes"]) == (3000, None, None, {})
    assert report["components"] is None
    outcome = cli("inspect", checkpoint)
    assert outcome.code == 0
    for words in ("3.0 kB", "1.bin", "2.0 kB", "not read: the weights are pickles"):
        assert words in outcome.out


def test_a_missing_pickle_is_named(cli, checkpoint):
    (checkpoint / "model.safetensors.index.json").unlink()
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "1.bin"}}))
    outcome = cli("inspect", checkpoint)
    assert (outcome.code, outcome.out) == (2, "")
    assert f"error: {checkpoint / '1.bin'} is missing" in outcome.err


def test_an_empty_checkpoint_file_is_a_file_without_tensors(cli, checkpoint):
    (checkpoint / "model.safetensors.index.json").unlink()
    save_file({}, checkpoint / "model.safetensors")
    assert load_file(checkpoint / "model.safetensors") == {}
    assert json.loads(cli("inspect", checkpoint, "--json").out)["parameters"] == 0
