"""Engines of the trained checkpoint, really built by TensorRT-RTX, which needs no GPU for it; and what is refused."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from corruptions import redescribe
from refusals import assert_tells, refused, snapshot

from exporter import engine as engine_module
from exporter.builder import configure, monitor_of
from exporter.engine import BuildResult, build
from exporter.engine_options import MAX_KEPT, BuildOptions, Shapes, resolve_shapes
from exporter.export import ExportOptions, export
from exporter.network import ParsedNetwork, parse
from plugins.tensorrt_network import CAUSALITIES, LENGTHS_ASSUMPTION, SOFTMAX_ASSUMPTION, NetworkMismatch
from runtime.bundle import Bundle
from runtime.errors import CheckFailed, UserError
from runtime.golden import Golden
from runtime.manifest import Manifest

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx (pip install 'nemotron-export[rtx]')")

OPTIONS = BuildOptions("tensorrt-rtx", capabilities=("8.9",))
LAYERS = {"attention": 4, "kv_cache_update": 8, "rotary": 8}

Of = Callable[[str], Path]


@pytest.fixture
def bundle(tensorrt_bundle: Path, tmp_path: Path) -> Path:
    """A bundle in fp16 without engines."""
    return Path(shutil.copytree(tensorrt_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def built(tensorrt_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> BuildResult:
    """An engine for 8.9 in a bundle that tests must not write into."""
    place = shutil.copytree(tensorrt_bundle, tmp_path_factory.mktemp("built") / "bundle")
    return build(Path(place), replace(OPTIONS, max_batch_size=2, max_input_len=64, max_seq_len=256))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.engine_options.local_capability", lambda: None)


def refusal(bundle: Path, options: BuildOptions) -> UserError:
    return refused(bundle, lambda: build(bundle, options))


# What is built


def test_the_engine_is_recorded_with_what_it_was_built_for(built: BuildResult, tensorrt_bundle: Path) -> None:
    (engine,) = Manifest.load(built.bundle).engines
    assert engine == built.engine
    assert engine.path == f"engines/tensorrt-rtx-{trt.__version__}-sm89/model.plan"
    assert (engine.flavor, engine.version, engine.capabilities) == ("tensorrt-rtx", trt.__version__, ("8.9",))
    assert (engine.max_batch_size, engine.max_input_len, engine.max_seq_len) == (2, 64, 256)
    assert (engine.precision, engine.causality, engine.max_kept) == ("fp16", "lower-right", MAX_KEPT)
    assert engine.graph_sha256 == Manifest.load(tensorrt_bundle).files["model.onnx"].sha256
    assert engine.assumptions == (LENGTHS_ASSUMPTION, SOFTMAX_ASSUMPTION)
    assert engine.selftested_on == ()


@pytest.mark.slow
def test_an_engine_is_built_of_a_bundle_whose_weights_are_the_checkpoints_own_file(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    options = ExportOptions(target="tensorrt", precision="bf16", weights="link", verify=False)
    bundle = export(checkpoint, tmp_path / "bundle", options).bundle
    result = build(bundle, replace(OPTIONS, max_batch_size=2, max_input_len=64, max_seq_len=256))
    assert {kind: result.layers[kind] for kind in LAYERS} == LAYERS


def test_the_bundle_is_whole_with_its_engine(built: BuildResult, tensorrt_bundle: Path) -> None:
    bundle = Bundle.open(built.bundle)
    assert bundle.has(built.engine.path)
    assert bundle.changed_files() == []
    assert [path.name for path in (built.bundle / "engines").iterdir()] == [Path(built.engine.path).parent.name]
    before, after = snapshot(tensorrt_bundle), snapshot(built.bundle)
    assert {name for name in before if before[name] != after[name]} == {"manifest.json"}


def test_every_native_layer_is_there(built: BuildResult) -> None:
    assert built.layers == LAYERS


def test_the_json_is_that_of_the_contract(built: BuildResult) -> None:
    written = built.to_json()
    assert written["schema"] == 1
    assert written["engine"] == built.engine.to_json()
    assert written["layers"] == LAYERS
    assert 0 < written["seconds"] < 60
    assert written["warnings"] == []


def test_one_engine_serves_several_capabilities(bundle: Path) -> None:
    result = build(bundle, replace(OPTIONS, capabilities=("8.0", "12.0", "8.0")))
    assert result.engine.capabilities == ("8.0", "12.0")
    assert "-sm80-sm120/" in result.engine.path


def test_a_mask_assumes_nothing_of_causality(bundle: Path) -> None:
    result = build(bundle, replace(OPTIONS, causality="mask", weight_streaming=True))
    assert (result.engine.causality, result.engine.assumptions) == ("mask", (SOFTMAX_ASSUMPTION,))
    assert result.engine.flags == ("weight-streaming",)


@pytest.mark.slow
@pytest.mark.parametrize("causality", CAUSALITIES)
def test_fp32_builds_though_it_has_no_fused_attention(tensorrt_bundle_of: Of, tmp_path: Path, causality: str) -> None:
    bundle = shutil.copytree(tensorrt_bundle_of("fp32"), tmp_path / "bundle")
    assert build(Path(bundle), replace(OPTIONS, causality=causality)).layers == LAYERS


@pytest.mark.slow
@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("capability", ["8.0", "8.6", "8.9", "12.0"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bit_builds_for_every_capability(
    tensorrt_bundle_of: Of, tmp_path: Path, precision: str, capability: str, causality: str
) -> None:
    bundle = shutil.copytree(tensorrt_bundle_of(precision), tmp_path / "bundle")
    options = replace(OPTIONS, capabilities=(capability,), causality=causality, max_batch_size=4)
    result = build(Path(bundle), options)
    assert (result.layers, result.warnings) == (LAYERS, ())
    lengths = () if causality == "mask" else (LENGTHS_ASSUMPTION,)
    assert result.engine.assumptions == (*lengths, SOFTMAX_ASSUMPTION)


# Shapes and flags


@pytest.mark.parametrize(
    ("options", "max_length", "expected"),
    [
        ({}, 8192, Shapes(1, 1024, 4096, 16)),
        ({}, 512, Shapes(1, 512, 512, 16)),
        ({"max_seq_len": 100}, 512, Shapes(1, 100, 100, 16)),
        ({"max_batch_size": 8, "max_input_len": 4, "max_seq_len": 512}, 512, Shapes(8, 4, 512, 4)),
    ],
)
def test_defaults_fit_the_bundle(options: dict[str, int], max_length: int, expected: Shapes) -> None:
    assert resolve_shapes(replace(OPTIONS, **options), max_length) == expected


@pytest.mark.parametrize(
    ("flavor", "sequences"), [("tensorrt-rtx", [(1, 1, 64)]), ("tensorrt", [(1, 64, 64), (1, 1, 1)])]
)
def test_profiles_are_those_of_the_flavor(
    tensorrt_bundle: Path, flavor: str, sequences: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT has a context for prefill and one for decode; TensorRT-RTX would hold its plan twice."""
    parsed = parse(trt, Bundle.open(tensorrt_bundle), 128)
    made: list[dict[str, tuple[tuple[int, ...], ...]]] = []

    def profile() -> Any:
        made.append({})
        real = builder_profile()
        shapes = made[-1]

        class Spy:
            def set_shape(self, name: str, *given: tuple[int, ...]) -> None:
                shapes[name] = given
                real.set_shape(name, *given)

        return Spy()

    builder_profile = parsed.builder.create_optimization_profile
    config = SimpleNamespace(
        add_optimization_profile=lambda _: len(made),
        set_compute_capability=lambda *_: None,
        set_flag=None,
        clear_flag=lambda _: None,
    )
    builder = SimpleNamespace(create_optimization_profile=profile, create_builder_config=lambda: config)
    configure(trt, builder, parsed.network, BuildOptions(flavor), Shapes(3, 64, 128, 16), ("8.9",))
    assert [tuple(shape[1] for shape in shapes["input_ids"]) for shapes in made] == sequences
    for shapes in made:
        assert shapes["input_ids"][2][0] == 3
        assert shapes["write_indices"] == ((1,), (3,), (3,))
        assert shapes["past_key_values.3.value"] == ((1, 2, 128, 64), (3, 2, 128, 64), (3, 2, 128, 64))


def test_fp32_is_not_rounded_to_tf32(tensorrt_bundle: Path) -> None:
    parsed = parse(trt, Bundle.open(tensorrt_bundle), 128)
    config = configure(trt, parsed.builder, parsed.network, OPTIONS, Shapes(1, 64, 128, 16), ("8.9",))
    assert not config.get_flag(trt.BuilderFlag.TF32)


# Progress, and what ends a build


def test_progress_rises_to_the_end(bundle: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build(bundle, OPTIONS, lambda *stage: seen.append(stage))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == ["check", "parse", "build", "write"]
    done = [done for stage, done, _ in seen if stage == "build"]
    assert done == sorted(done)
    assert len(set(done)) > 10


def test_progress_of_nested_phases_adds_up() -> None:
    seen: list[float] = []
    ended: list[bool] = []
    monitor = monitor_of(trt, seen.append, lambda: ended.append(True))
    monitor.phase_start("build", None, 2)
    monitor.phase_start("part", "build", 2)
    monitor.step_complete("part", 0)
    monitor.step_complete("part", 1)
    monitor.phase_finish("part")
    monitor.step_complete("build", 0)
    assert not ended
    monitor.step_complete("build", 1)
    monitor.phase_finish("build")
    assert seen == [0.25, 0.5, 0.5, 1.0]
    assert ended == [True]


def test_mapped_weights_leave_memory_before_the_engine_is_serialised(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise they count a third time, beside those in the engine and in its plan."""
    released: list[str] = []
    real = ParsedNetwork.release_pages
    stages: list[str] = []

    def release(network: ParsedNetwork) -> None:
        released.append(stages[-1])
        real(network)

    monkeypatch.setattr(ParsedNetwork, "release_pages", release)
    build(bundle, OPTIONS, lambda stage, *_: stages.append(stage))
    assert released == ["build"]


def test_an_interruption_ends_the_build_and_leaves_nothing(bundle: Path) -> None:
    def interrupt(stage: str, done: int, _: int) -> None:
        if stage == "build" and done:
            raise KeyboardInterrupt

    before = snapshot(bundle)
    with pytest.raises(KeyboardInterrupt):
        build(bundle, OPTIONS, interrupt)
    assert snapshot(bundle) == before


@pytest.mark.parametrize("name", ["phase_start", "step_complete", "phase_finish"])
def test_an_interruption_is_kept_wherever_it_strikes(name: str) -> None:
    """TensorRT prints what a callback raises and goes on: a signal that arrives there would be lost."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monitor = monitor_of(trt, interrupt, interrupt)
    if name == "phase_start":
        monitor._phases = SimpleNamespace(append=interrupt)
    getattr(monitor, name)(*{"phase_start": ("p", None, 1), "step_complete": ("p", 0)}.get(name, ("p",)))
    assert isinstance(monitor.stopped, KeyboardInterrupt)
    assert monitor.step_complete("p", 0) is False


def test_a_build_that_fails_says_why_and_leaves_nothing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any) -> Any:
        config = configure(*arguments)
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)  # wants a library that TensorRT-RTX does not have
        return config

    monkeypatch.setattr(engine_module, "configure", failing)
    assert_tells(refusal(bundle, OPTIONS), "tensorrt-rtx", "8.9", "libnvinfer_lean", "try another --precision")


def test_an_engine_that_exists_is_replaced_only_by_force(bundle: Path) -> None:
    first = build(bundle, OPTIONS).engine
    assert_tells(refusal(bundle, replace(OPTIONS, max_batch_size=2)), first.path, "--force")
    second = build(bundle, replace(OPTIONS, max_batch_size=2, force=True)).engine
    assert Manifest.load(bundle).engines == (second,)
    assert Bundle.open(bundle).changed_files() == []
    other = build(bundle, replace(OPTIONS, capabilities=("8.6",))).engine
    assert Manifest.load(bundle).engines == (second, other)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("place", ["pathlib.Path.write_bytes", "os.fsync"])
def test_a_full_disk_leaves_the_bundle_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, force: bool, place: str
) -> None:
    """Whether the plan does not fit or, when it is in its place, the manifest."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if force:
        build(bundle, OPTIONS)
    before = snapshot(bundle)
    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(UserError) as refused:
            build(bundle, replace(OPTIONS, max_batch_size=3, force=force))
    assert_tells(refused.value, "No space left on device", "free space")
    assert snapshot(bundle) == before


def test_what_is_said_of_a_network_is_kept_with_it(tensorrt_bundle: Path) -> None:
    """TensorRT ignores a second logger while anything of the first is alive: messages would go astray."""
    bundle = Bundle.open(tensorrt_bundle)
    networks = [parse(trt, bundle, 128) for _ in range(2)]
    for network in networks:
        assert any("Int64 binding" in warning for warning in network.messages.warnings)
        assert not any("logger" in warning for warning in network.messages.warnings)


def test_an_engine_that_no_manifest_names_is_replaced(bundle: Path) -> None:
    """What a build leaves that was killed between its two renames."""
    place = bundle / "engines" / f"tensorrt-rtx-{trt.__version__}-sm89"
    place.mkdir(parents=True)
    (place / "model.plan").write_bytes(b"half")
    build(bundle, OPTIONS)
    assert Bundle.open(bundle).changed_files() == []


# What is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"flavor": "tensorflow"}, ["'tensorflow'", "tensorrt-rtx"]),
        ({"capabilities": ("9.0",)}, ["9.0", "8.9, 12.0"]),
        ({"capabilities": ("sm89",)}, ["'sm89'", "8.9"]),
        ({"capabilities": ("8.9", "89")}, ["'89'"]),
        ({"max_seq_len": 513}, ["--max-seq-len", "1..512", "513"]),
        ({"max_seq_len": 0}, ["--max-seq-len", "1..512"]),
        ({"max_input_len": 513}, ["--max-input-len", "1..512", "513"]),
        ({"max_seq_len": 64, "max_input_len": 65}, ["--max-input-len", "1..64", "65"]),
        ({"max_input_len": 0}, ["--max-input-len"]),
        ({"max_batch_size": 0}, ["--max-batch-size"]),
        ({"causality": "upper-left"}, ["'upper-left'", "lower-right, mask"]),
        ({"hardware_compatibility": "ampere-plus"}, ["--hardware-compatibility", "--compute-capability"]),
        ({"version_compatible": True}, ["--version-compatible"]),
        ({"timing_cache": Path("cache")}, ["--timing-cache"]),
        ({"strip": True}, ["--strip", "GPU"]),
        ({"capabilities": ()}, ["--compute-capability 8.9"]),
    ],
)
def test_what_cannot_be_built_is_refused(bundle: Path, no_gpu: None, changes: dict[str, Any], named: list[str]) -> None:
    assert_tells(refusal(bundle, replace(OPTIONS, **changes)), *named)


def test_a_bundle_of_the_other_target_is_refused(tiny_bundle: Path) -> None:
    assert_tells(refusal(tiny_bundle, OPTIONS), "of target onnxruntime", "--target tensorrt")


def test_a_precision_that_a_gpu_lacks_is_refused(tensorrt_bundle_of: Of) -> None:
    options = replace(OPTIONS, capabilities=("8.9", "7.5"))
    assert_tells(refusal(tensorrt_bundle_of("bf16"), options), "7.5 lacks bf16", "--precision fp16")


@pytest.mark.parametrize(("flavor", "module", "extra"), [("tensorrt", "tensorrt", "tensorrt"),
                                                         ("tensorrt-rtx", "tensorrt_rtx", "rtx")])  # fmt: skip
@pytest.mark.parametrize(
    ("found", "named"),
    [
        (None, "is not installed"),
        (SimpleNamespace(__version__="0.9.9.1"), "0.9.9.1 is too old"),
        (SimpleNamespace(), "without a version is too old"),
    ],
)
def test_without_the_package_its_command_is_named(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, flavor: str, module: str, extra: str, found: Any, named: str
) -> None:
    monkeypatch.setitem(sys.modules, module, found)
    error = refusal(bundle, replace(OPTIONS, flavor=flavor))
    assert_tells(error, f"{flavor} {named}" if found is None else named, f"'nemotron-export[{extra}]'")


def test_a_package_whose_libraries_do_not_load_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise ImportError("libnvinfer.so.11: cannot open\nshared object file")

    monkeypatch.setattr("runtime.tensorrt_api.import_module", broken)
    assert_tells(refusal(bundle, replace(OPTIONS, flavor="tensorrt")), "libnvinfer.so.11", "pip install")


@pytest.mark.parametrize(
    ("local", "given", "named"),
    [
        (None, (), ["no NVIDIA GPU", "--flavor tensorrt-rtx"]),
        (None, ("8.9",), ["no NVIDIA GPU", "--flavor tensorrt-rtx"]),
        ("9.0", ("8.9",), ["which is 9.0, not for 8.9", "--flavor tensorrt-rtx"]),
        ("9.0", ("9.0", "8.9"), ["which is 9.0"]),
    ],
)
def test_tensorrt_builds_only_for_the_gpu_at_hand(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, local: str | None, given: tuple[str, ...], named: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.1.0", __name__="tensorrt"))
    monkeypatch.setattr("exporter.engine_options.local_capability", lambda: local)
    assert_tells(refusal(bundle, replace(OPTIONS, flavor="tensorrt", capabilities=given)), *named)


def test_changed_weights_are_not_built(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx.data").read_bytes())
    data[5000] ^= 1
    (bundle / "model.onnx.data").write_bytes(data)
    error = refusal(bundle, OPTIONS)
    assert isinstance(error, CheckFailed)
    assert "model.onnx.data differs from the manifest's sha256; copy or export" in str(error)


def edit(bundle: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    change(model)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    redescribe(bundle)


def external(model: onnx.ModelProto, key: str) -> onnx.StringStringEntryProto:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    return next(entry for entry in tensor.external_data if entry.key == key)


def _unknown_operator(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "LayerNormalization").op_type = "LayerNormalisation"


def _outside(model: onnx.ModelProto) -> None:
    external(model, "location").value = "../model.onnx.data"


def _beyond(model: onnx.ModelProto) -> None:
    external(model, "offset").value = str(2**40)


@pytest.mark.parametrize(
    ("change", "named"),
    [(_unknown_operator, "LayerNormalisation"), (_outside, "not in the bundle"), (_beyond, "model.onnx.data ends")],
)
def test_a_graph_that_cannot_be_parsed_is_refused(
    bundle: Path, change: Callable[[onnx.ModelProto], None], named: str
) -> None:
    edit(bundle, change)
    assert_tells(refusal(bundle, OPTIONS), named, "export")


def test_a_file_that_is_no_graph_is_refused(bundle: Path) -> None:
    (bundle / "model.onnx").write_bytes(b"not a graph")
    redescribe(bundle)
    assert_tells(refusal(bundle, OPTIONS), "model.onnx", "export the bundle again")


def test_a_network_of_another_form_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer parser may turn the graph into something that nobody has looked at."""

    def mend(*_: Any, **__: Any) -> None:
        raise NetworkMismatch("the graph holds 4 attention, the parser made 0 attention")

    monkeypatch.setattr("exporter.network.mend", mend)
    assert_tells(refusal(bundle, OPTIONS), "tensorrt_rtx", trt.__version__, "the parser made 0 attention", "install")


def test_a_capacity_in_which_the_golden_cases_do_not_fit_is_refused_before_the_build(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from exporter.export import ExportOptions, export

    bundle = export(tiny_checkpoint, tmp_path / "gated", ExportOptions(target="tensorrt", max_length=64)).bundle
    needed = Golden.load(bundle / "golden.npz").capacity
    assert needed <= 40
    with pytest.raises(UserError, match=f"--max-seq-len should be at least {needed}, which the golden cases take"):
        build(bundle, BuildOptions(flavor="tensorrt-rtx", capabilities=("8.9",), max_seq_len=needed - 1))
