from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from runtime.manifest import Engine

ENGINE = Engine(
    path="engines/tensorrt-rtx-1.7.1-sm89/model.plan",
    flavor="tensorrt-rtx",
    version="1.7.1",
    capabilities=("8.9",),
    max_batch_size=1,
    max_input_len=1024,
    max_seq_len=4096,
    max_kept=16,
    precision="fp16",
    causality="lower-right",
    graph_sha256="0" * 64,
    assumptions=("lower-right causality counts from key_value_lengths",),
)


class FakeBuilder(ModuleType):
    """Stands for `exporter.engine`: notes what it is asked for, and reports progress."""

    def __init__(self) -> None:
        super().__init__("exporter.engine")
        self.asked: list[Any] = []
        self.warnings: tuple[str, ...] = ()

    def build(self, bundle: Path, options: Any, progress: Any) -> Any:
        from exporter.engine_options import BuildOptions

        assert isinstance(options, BuildOptions)
        self.asked.append((bundle, options))
        print("a library's chatter")
        for stage in ("check", "parse", "build", "write"):
            progress(stage, 0, 1)
        return Result(bundle, self.warnings)


class Result:
    def __init__(self, bundle: Path, warnings: tuple[str, ...]) -> None:
        self.bundle = bundle
        self.warnings = warnings
        self.engine = ENGINE
        self.plan_bytes = 8_400_000
        self.layers = {"attention": 32, "kv_cache_update": 64, "rotary": 64}
        self.seconds = 61.25
        self.peak_rss_mb = 7219.7

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, "engine": self.engine.to_json()}


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> FakeBuilder:
    fake = FakeBuilder()
    monkeypatch.setitem(sys.modules, "exporter.engine", fake)
    monkeypatch.setattr("runtime.tensorrt_api.import_tensorrt", lambda flavor: None)
    monkeypatch.setattr("runtime.bundle.Bundle.open", lambda path: None)
    return fake


def test_the_defaults_are_those_of_the_contract(cli, builder, tmp_path):
    assert cli("build", tmp_path, "--flavor", "tensorrt").code == 0
    ((bundle, options),) = builder.asked
    assert bundle == tmp_path
    assert (options.flavor, options.capabilities, options.causality) == ("tensorrt", (), "lower-right")
    assert options.attention == "native"
    assert (options.max_batch_size, options.max_input_len, options.max_seq_len) == (1, None, None)
    assert (options.force, options.flags, options.optimization_level) == (False, (), None)


def test_every_flag_arrives(cli, builder, tmp_path):
    flags = (
        "--flavor tensorrt-rtx --compute-capability 8.9 --compute-capability 12.0 --max-batch-size 2 --max-input-len 3 "
        "--max-seq-len 4 --attention plugin --causality mask --optimization-level 5 --version-compatible "
        "--hardware-compatibility ampere-plus --weight-streaming --strip --profiling-verbosity detailed "
        "--timing-cache cache --force"
    )
    assert cli("build", tmp_path, *flags.split()).code == 0
    from exporter.engine_options import BuildOptions

    expected = BuildOptions(
        flavor="tensorrt-rtx",
        capabilities=("8.9", "12.0"),
        max_batch_size=2,
        max_input_len=3,
        max_seq_len=4,
        attention="plugin",
        causality="mask",
        optimization_level=5,
        hardware_compatibility="ampere-plus",
        version_compatible=True,
        weight_streaming=True,
        strip=True,
        profiling_verbosity="detailed",
        timing_cache=Path("cache"),
        force=True,
    )
    assert builder.asked == [(tmp_path, expected)]


def test_json_is_one_object_whatever_libraries_print(cli, builder, tmp_path):
    outcome = cli("build", tmp_path, "--flavor", "tensorrt", "--json")
    assert json.loads(outcome.out) == {"schema": 1, "engine": ENGINE.to_json()}
    assert "chatter" in outcome.err


def test_the_result_shows_what_it_runs_on_and_assumes(cli, builder, tmp_path):
    out = cli("build", tmp_path, "--flavor", "tensorrt-rtx").out
    for words in ("8.4 MB", "capability 8.9", "1 × 1024 tokens", "4096 tokens", "32 attention", "lower-right causality",
                  "7.2 GB"):  # fmt: skip
        assert words in out
    assert f"next: nemotron-export selftest {tmp_path} --backend tensorrt-rtx" in out


def test_warnings_go_to_stderr(cli, builder, tmp_path):
    builder.warnings = ("the GPU is busy",)
    outcome = cli("build", tmp_path, "--flavor", "tensorrt", "--json")
    assert "TensorRT warns: the GPU is busy\n" in outcome.err
    assert "busy" not in outcome.out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--flavor", "tensorflow"), "'tensorrt', 'tensorrt-rtx'"),
        ((), "--flavor"),
        (("--flavor", "tensorrt", "--max-batch-size", "0"), "--max-batch-size"),
        (("--flavor", "tensorrt", "--causality", "upper-left"), "'lower-right', 'mask'"),
        (("--flavor", "tensorrt", "--attention", "fused"), "'native', 'plugin'"),
        (("--flavor", "tensorrt", "--optimization-level", "6"), "--optimization-level"),
    ],
)
def test_a_wrong_flag_is_one_line(cli, builder, tmp_path, arguments, named):
    outcome = cli("build", tmp_path, *arguments)
    assert (outcome.code, outcome.out, builder.asked) == (2, "", [])
    assert len(outcome.err.splitlines()) == 1
    assert named in outcome.err


@pytest.mark.parametrize(
    ("flavor", "module", "extra"), [("tensorrt", "tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx", "rtx")]
)
def test_without_the_package_its_command_is_named(cli, tensorrt_bundle, monkeypatch, flavor, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    outcome = cli("build", tensorrt_bundle, "--flavor", flavor)
    assert (outcome.code, outcome.out) == (2, "")
    remedy = f"pip install --upgrade 'nemotron-export[{extra}]'"
    assert outcome.err == f"error: {flavor} is not installed; {remedy}\n"


def test_what_is_not_a_bundle_is_refused_first(cli, tmp_path):
    outcome = cli("build", tmp_path / "nowhere", "--flavor", "tensorrt")
    assert outcome.code == 2
    assert "does not exist" in outcome.err


def test_the_choices_are_what_the_builder_knows():
    from exporter import engine_options
    from exporter.cli import build as command
    from plugins import tensorrt_network
    from runtime import tensorrt_api

    assert tuple(tensorrt_api.FLAVORS) == command.FLAVORS
    assert engine_options.ATTENTIONS == command.ATTENTIONS
    assert tensorrt_network.CAUSALITIES == command.CAUSALITIES
    assert engine_options.HARDWARE_COMPATIBILITY == command.HARDWARE_COMPATIBILITY
    assert engine_options.PROFILING_VERBOSITY == command.PROFILING_VERBOSITY


# Builds with torch and its like made to fail on import, as on the deployment machine; onnx is in the extras.
_WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "onnxscript", "onnx_ir", "safetensors", "onnxruntime"): sys.modules[name] = None
from exporter.cli import main; main()
"""


def test_the_deployment_machine_builds_without_torch(tensorrt_bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx (pip install 'nemotron-export[rtx]')")
    bundle = shutil.copytree(tensorrt_bundle, tmp_path / "bundle")
    flags = ["--flavor", "tensorrt-rtx", "--compute-capability", "8.9", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TORCH, "build", bundle, *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["layers"] == {"attention": 4, "kv_cache_update": 8, "rotary": 8}
    assert (bundle / report["engine"]["path"]).is_file()
    assert report["seconds"] < 20
