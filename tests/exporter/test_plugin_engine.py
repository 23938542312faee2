"""`build --attention plugin` up to the builder's work, against a strict fake of TensorRT; and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx
import pytest
from fake_tensorrt_parser import FakeTensorRTParser, Layer
from refusals import assert_tells, refused, snapshot

from benchmarks.gpu_check import with_kernels
from exporter.engine import build
from exporter.engine_options import BuildOptions
from exporter.plugin_attention import KernelPlugins
from plugins.kernels.shape import SPLIT_CONFIGS
from plugins.tensorrt_network import PLUGIN_ASSUMPTIONS
from runtime.errors import UserError
from runtime.manifest import Engine, Manifest

pytest.importorskip("triton", reason="needs Triton (pip install 'nemotron-export[kernels]')")

OPTIONS = BuildOptions("tensorrt", attention="plugin", max_seq_len=256)

Of = Callable[[str], Path]


@pytest.fixture
def trt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRTParser:
    """TensorRT on a machine with a GPU of 8.9, whose builder gives a plan."""
    fake = FakeTensorRTParser()
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", fake.plugin)
    monkeypatch.setattr("exporter.engine_options.local_capability", lambda: "8.9")
    monkeypatch.setattr("exporter.engine._build", lambda *_: b"plan")
    for name in ("compile_split", "compile_merge"):  # tests/plugins/kernels compile them
        monkeypatch.setattr(f"plugins.kernels.registration.{name}", lambda *of: SimpleNamespace(ptx=repr(of)))
    return fake


@pytest.fixture
def bundle(tensorrt_bundle: Path, tmp_path: Path) -> Path:
    """A bundle in fp16 without engines."""
    return Path(shutil.copytree(tensorrt_bundle, tmp_path / "bundle"))


def refusal(bundle: Path, options: BuildOptions) -> UserError:
    return refused(bundle, lambda: build(bundle, options))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_engine_holds_a_plugin_for_each_op_and_its_record_says_so(
    trt: FakeTensorRTParser, tensorrt_bundle_of: Of, tmp_path: Path, precision: str
) -> None:
    bundle = Path(shutil.copytree(tensorrt_bundle_of(precision), tmp_path / "bundle"))
    result = build(bundle, OPTIONS)
    assert result.layers == {"attention": 0, "kv_cache_update": 8, "rotary": 4, "plugin": 8}
    (engine,) = Manifest.load(bundle).engines
    assert (engine.attention, engine.assumptions) == ("plugin", PLUGIN_ASSUMPTIONS)
    nodes = [node for node in trt.parsed.graph.node if node.domain]
    assert Counter(node.op_type for node in nodes) == {"SplitAttention": 4, "MergeAttention": 4}
    (namespace,) = {a.s for node in nodes for a in node.attribute if a.name == "plugin_namespace"}
    assert sorted(trt.plugin.plugins) == [f"{namespace.decode()}::{op}Attention" for op in ("Merge", "Split")]


def test_the_bundles_own_graph_stays(trt: FakeTensorRTParser, bundle: Path) -> None:
    before = snapshot(bundle)
    build(bundle, OPTIONS)
    after = snapshot(bundle)
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}


def test_a_manifest_from_before_has_native_engines() -> None:
    record = {
        "path": "engines/tensorrt-11.0-sm89/model.plan", "flavor": "tensorrt", "version": "11.0",
        "capabilities": ["8.9"], "max_batch_size": 1, "max_input_len": 1, "max_seq_len": 1, "max_kept": 1,
        "precision": "fp16", "causality": "lower-right", "graph_sha256": "0",
    }  # fmt: skip
    assert Engine.from_json(record, "engines[0]").attention == "native"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"flavor": "tensorrt-rtx"}, ["tensorrt-rtx takes no plugins that are compiled ahead", "--attention native"]),
        ({"attention": "fused"}, ["'fused'", "native, plugin"]),
        ({"causality": "mask"}, ["--causality mask", "--attention plugin"]),
        ({"hardware_compatibility": "ampere-plus"}, ["--hardware-compatibility", "--attention plugin"]),
        ({"version_compatible": True}, ["--version-compatible", "--attention plugin"]),
        ({"strip": True}, ["--strip", "--attention plugin"]),
    ],
)
def test_what_the_kernels_cannot_go_with_is_refused(
    trt: FakeTensorRTParser, bundle: Path, changes: dict[str, Any], named: list[str]
) -> None:
    assert_tells(refusal(bundle, replace(OPTIONS, **changes)), *named)


@pytest.mark.parametrize("capability", ["7.5", "8.7", "10.0"])
def test_a_gpu_without_kernels_is_refused(
    trt: FakeTensorRTParser, bundle: Path, monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    monkeypatch.setattr("exporter.engine_options.local_capability", lambda: capability)
    named = (f"compute capability {capability} has no", "8.0, 8.6, 8.9, 9.0, 12.0", "--attention native")
    assert_tells(refusal(bundle, OPTIONS), *named)


def test_a_tensorrt_without_its_plugin_module_is_refused(
    trt: FakeTensorRTParser, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    assert_tells(refusal(bundle, OPTIONS), "tensorrt 11.4.0.1 has no tensorrt.plugin", "--attention native")
    old = ModuleType("tensorrt.plugin")
    old.register = old.autotune = lambda name: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", old)
    assert_tells(refusal(bundle, OPTIONS), "has no aot_impl", "--attention native")


def test_what_tensorrts_plugin_module_prints_stays_out_of_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """NVIDIA's warns from C++, on stdout, where `build --json` prints one object."""
    loud = tmp_path / "loud_tensorrt"
    loud.mkdir()
    (loud / "__init__.py").touch()
    (loud / "plugin.py").write_text("import os\nos.write(1, b'experimental')\nregister = autotune = aot_impl = None\n")
    monkeypatch.syspath_prepend(tmp_path)
    KernelPlugins(SimpleNamespace(__name__=loud.name), OPTIONS, "8.9")
    os.write(1, b"the result")
    assert capfd.readouterr() == ("the result", "experimental")


@pytest.mark.parametrize("name", ["triton", "onnx_ir"])
def test_what_the_extra_brings_is_named_where_it_is_missing_and_torch_is_not_needed(name: str) -> None:
    code = f"""
import sys
for name in ("torch", "transformers", "onnxruntime", {name!r}): sys.modules[name] = None
from types import SimpleNamespace
from exporter.engine import build
from exporter.engine_options import BuildOptions
from exporter.plugin_attention import change_of
trt = SimpleNamespace(__name__="tensorrt", __version__="11.4")
change_of(trt, BuildOptions("tensorrt", attention="plugin"), "8.9", None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    (*_, last) = done.stderr.splitlines()
    assert last == (
        f"runtime.errors.UserError: the attention kernels need {name}, which is not installed; "
        "pip install 'nemotron-export[kernels]', or build with --attention native"
    )


def test_fp32_and_a_width_without_kernels_are_refused(
    trt: FakeTensorRTParser, bundle: Path, tensorrt_bundle_of: Of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = Path(shutil.copytree(tensorrt_bundle_of("fp32"), tmp_path / "fp32"))
    assert_tells(refusal(exact, OPTIONS), "float32 has no kernel", "float16, bfloat16", "--attention native")
    without = {width: configs for width, configs in SPLIT_CONFIGS.items() if width != 64}
    monkeypatch.setattr("plugins.kernels.shape.SPLIT_CONFIGS", without)
    assert_tells(refusal(bundle, OPTIONS), "head_dim 64 has no", "96, 128, 192", "--attention native")


def test_a_triton_that_makes_other_kernels_is_refused(
    trt: FakeTensorRTParser, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plugins.kernels.compile import UnexpectedPtx

    def other(*_: Any) -> None:
        raise UnexpectedPtx("expected 7 parameters and 2 more, found 8")

    monkeypatch.setattr("plugins.kernels.registration.compile_merge", other)
    assert_tells(refusal(bundle, OPTIONS), "Triton 3.", "found 8", "install 3.7.1", "--attention native")


def test_a_plugin_that_reads_a_copy_of_the_cache_is_refused(
    trt: FakeTensorRTParser, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Layer.__init__

    def copied(self: Layer, node: onnx.NodeProto, kind: Any) -> None:
        made(self, node, kind)
        if node.op_type == "SplitAttention":
            self._inputs[4].name = node.input[0]

    monkeypatch.setattr(Layer, "__init__", copied)
    assert_tells(refusal(bundle, OPTIONS), "takes its values from OTHER, not from KV_CACHE_UPDATE", "install")


def test_a_plugin_layer_that_is_missing_is_refused(
    trt: FakeTensorRTParser, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fake_tensorrt_parser.Parser._plugin", lambda self, node: trt.LayerType.OTHER)
    assert_tells(refusal(bundle, OPTIONS), "8 plugin", "the parser made", "0 plugin")


def test_the_check_of_a_gpu_machine_builds_such_an_engine_or_says_why_not(
    trt: FakeTensorRTParser,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (made,) = with_kernels(bundle, tmp_path / "made")
    assert [engine.attention for engine in Manifest.load(made).engines] == ["plugin"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("exporter.engine_options.local_capability", lambda: "7.5")
    assert list(with_kernels(bundle, tmp_path / "none")) == []
    assert "skipped: attention kernels for bundle (compute capability 7.5" in capsys.readouterr().err
