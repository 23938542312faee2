"""What `plan` and the refusals of `export` say of sizes is what is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_checkpoint

from exporter import cost
from exporter.checkpoint import Checkpoint
from exporter.export import ExportOptions, export
from exporter.forecast import forecast
from exporter.parameters import expected_shapes, shapes_in
from exporter.plan import make_plan
from exporter.recipe import FORMS
from exporter.spec import read_config
from exporter.tasks import TASKS
from exporter.tensor_files import read_checkpoint_headers
from exporter.throughput import Throughput
from runtime.bundle import Bundle

EVERY = [(target, precision) for target, forms in FORMS.items() for precision in forms]
RATES = Throughput(1e9, 1e9, 1e9, 1e11, 1e10, {name: 1e8 for _, name in EVERY})


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Any:
    """Traces by what they are of, each made once."""
    import exporter.export as module

    original, done = module.trace, {}

    def trace(spec: Any, task: Any, *, cached: bool) -> Any:
        key = repr((spec, spec.config.to_dict(), task.name, cached))
        if key not in done:
            done[key] = original(spec, task, cached=cached)
        return done[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "trace", trace)
        yield


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exporter.forecast.measure_throughput", lambda *_: RATES)


@pytest.fixture(scope="module")
def wide_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of which the embedding is nearly all, tied, with biases."""
    return write_checkpoint(
        tmp_path_factory.mktemp("wide") / "wide",
        vocab_size=20_000,
        hidden_size=128,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    )


def told(checkpoint: Path, options: ExportOptions) -> Any:
    found = forecast(Checkpoint.open(checkpoint), Path("x"), options, [options.precision], 10**10)
    return found.precisions[0]


def check(checkpoint: Path, place: Path, options: ExportOptions) -> Bundle:
    bundle = Bundle.open(export(checkpoint, place, options).bundle)
    real = sum(record.bytes for record in bundle.manifest.files.values())
    estimate = told(checkpoint, options)
    assert estimate.bundle == pytest.approx(real, rel=0.01)
    model = cost.model_of(shapes_in(read_checkpoint_headers(checkpoint)), options.task, read_config(checkpoint))
    plan = make_plan(options, Checkpoint.open(checkpoint))
    tables = replace(model, table=plan.max_length * plan.form.cache * Checkpoint.open(checkpoint).spec.rotary_dim // 2)
    assert cost.data_bytes(tables, plan.precision) == pytest.approx(
        bundle.manifest.files["model.onnx.data"].bytes, abs=cost.ALIGNMENT
    )
    if bundle.has_cache:
        assert estimate.cache_per_token == bundle.cache_geometry.bytes_per_token
    return bundle


@pytest.mark.parametrize(("target", "precision"), EVERY)
def test_the_size_told_is_the_trained_checkpoints_bundle_within_a_hundredth(
    target: str, precision: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    options = ExportOptions(target=target, precision=precision, verify=False, fp16_safe=False)
    check(tiny_checkpoint, tmp_path / "bundle", options)


@pytest.mark.parametrize(
    ("target", "precision", "more"),
    [
        ("onnxruntime", "fp32", {}),
        ("onnxruntime", "fp16", {"fp16_safe": False, "kv_cache": "int8", "calibration_tokens": 64}),
        ("onnxruntime", "int8", {}),
        ("onnxruntime", "int4", {"recipe": "fine"}),
        ("tensorrt", "bf16", {}),
        ("tensorrt", "fp8", {}),
    ],
)
def test_a_tied_head_biases_and_a_large_vocabulary_are_counted(
    target: str, precision: str, more: dict[str, Any], wide_vocabulary: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"t{i}" for i in range(200)))
    if "kv_cache" in more:
        more = more | {"calibration": text}
    check(wide_vocabulary, tmp_path / "bundle", ExportOptions(target=target, precision=precision, verify=False, **more))


def test_a_calibrated_recipes_scratch_and_factors_are_counted(
    wide_vocabulary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Path(shutil.copytree(wide_vocabulary, tmp_path / "checkpoint"))
    (checkpoint / "calibration.txt").write_text(" ".join(f"t{i}" for i in range(200)))
    recipe = tmp_path / "gptq.toml"
    recipe.write_text('block = 32\nmethod = "gptq"\nscaling = true\n')
    options = ExportOptions(precision="int4", recipe=str(recipe), verify=False, calibration_tokens=64)
    held: list[int] = []
    save = shutil.rmtree

    def rmtree(place: Any, *args: Any, **more: Any) -> None:
        held.extend(
            [path.stat().st_size for path in Path(place).glob("*.npz")] if Path(place).name == "rounded" else []
        )
        save(place, *args, **more)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    check(checkpoint, tmp_path / "bundle", options)
    estimate = told(checkpoint, options)
    assert estimate.disk - estimate.bundle == pytest.approx(sum(held), rel=0.2)  # each file has a head of its own


@pytest.mark.parametrize(
    "task",
    [
        "question-answering",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in TASKS
            if name.endswith(("extraction", "classification"))
        ),
    ],
)
def test_the_head_of_another_task_is_counted(task: str, tmp_path: Path) -> None:
    architecture = TASKS[task].architecture
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", architecture=architecture, vocab_size=20_000, num_labels=3, hidden_size=128
    )
    found = shapes_in(read_checkpoint_headers(checkpoint))
    assert found == expected_shapes(Checkpoint.open(checkpoint).spec, TASKS[task])  # by transformers' own module
    estimate = told(checkpoint, ExportOptions(verify=False))
    bundle = Bundle.open(export(checkpoint, tmp_path / "bundle", ExportOptions(verify=False)).bundle)
    assert estimate.bundle == pytest.approx(sum(file.bytes for file in bundle.manifest.files.values()), rel=0.01)
    assert estimate.cache_per_token == 0


def test_a_head_that_the_task_does_without_is_not_counted(small_checkpoint: Path) -> None:
    shapes, config = shapes_in(read_checkpoint_headers(small_checkpoint)), read_config(small_checkpoint)
    whole = cost.model_of(shapes, None, config).parameters
    assert whole - cost.model_of(shapes, "feature-extraction", config).parameters == 97 * 64


def test_what_fits_beside_the_weights_does_fit(tiny_checkpoint: Path) -> None:
    memory = 10**9
    found = forecast(
        Checkpoint.open(tiny_checkpoint), Path("x"), ExportOptions(), ["fp32"], memory, batch=300, length=256
    )
    estimate = found.precisions[0]
    fit, per_token = estimate.fit, 2 * 4 * 2 * 64 * 4  # keys and values, 4 layers, 2 heads of 64, fp32
    assert fit is not None
    assert estimate.cache_per_token == per_token
    room = memory - estimate.bundle - cost.RUNTIME
    assert fit.batch * 256 * per_token <= room + 10**6
    assert (fit.batch + 2) * 256 * per_token > room
    assert fit.longest == 512  # at most the model's, though more would fit
    assert 300 * 512 * per_token <= room


def test_peaks_are_ordered_as_what_is_held(tiny_checkpoint: Path) -> None:
    options = replace(ExportOptions(), precision="int4", recipe="aware")
    calibrated, plain = told(tiny_checkpoint, options), told(tiny_checkpoint, ExportOptions(precision="int4"))
    assert calibrated.peak > plain.peak >= cost.BASE
    for estimate in (calibrated, plain):
        assert estimate.peak_whole >= estimate.peak
        assert estimate.peak_layered >= estimate.peak
    assert cost.whole_gate_bytes(4 * 10**9) == cost.BASE + 64 * 10**9


def test_the_report_is_json(tiny_checkpoint: Path) -> None:
    found = forecast(Checkpoint.open(tiny_checkpoint), Path("x"), ExportOptions(), [], 10**10)
    assert [entry["precision"] for entry in json.loads(json.dumps(found.to_json()))["precisions"]] == list(
        FORMS["onnxruntime"]
    )
