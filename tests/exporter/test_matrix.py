"""The whole configuration space, all heads and all forms of graph: each is exported and passes its gate."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from checkpoints import SMALL, write_checkpoint
from matrix import ABSENT, CONFIGURATIONS, Case
from transformers.activations import ACT2FN
from transformers.models.nemotron.modeling_nemotron import NemotronRotaryEmbedding

from exporter import trace as tracing
from exporter.export import ExportOptions, ExportResult, export
from exporter.spec import LEARNED_ACTIVATIONS, NemotronSpec
from exporter.tasks import CACHED, CARRIED, GENERATION, HEAD, TASKS, UNCACHED, Task
from exporter.verify import verify
from exporter.yardstick import LIMIT
from runtime import load
from runtime.golden import selftest

LAYERS = SMALL["num_hidden_layers"]
Exported = Callable[..., ExportResult]
_traces: dict[str, ir.Model] = {}


# What a trace of one layer does not depend on.
UNTRACED = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "rope_parameters", "id2label"}
UNTRACED |= {"label2id", "architectures", "tie_word_embeddings", "num_hidden_layers"}


@pytest.fixture(autouse=True)
def _trace_each_structure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies are a constant of the trace: where nothing else differs, they alone are put in anew."""
    original = tracing.trace_whole

    def trace_whole(spec: NemotronSpec, task: Task, *, cached: bool) -> ir.Model:
        config = {name: value for name, value in spec.config.to_dict().items() if name not in UNTRACED}
        module = NemotronRotaryEmbedding(spec.config)
        scaling = module.attention_scaling
        key = json.dumps([config, spec.rotary_dim, scaling, spec.config.num_labels, task.name, cached], default=str)
        if key not in _traces:
            _traces[key] = original(spec, task, cached=cached)
        model = _traces[key].clone()
        for buffer, held in module.named_buffers():
            name = f"model.rotary_emb.{buffer}"
            if name in model.graph.initializers:
                model.graph.initializers[name].const_value = ir.tensor(held.numpy(), name=name)
        return model

    monkeypatch.setattr(tracing, "trace_whole", trace_whole)


def checkpoint_of(directory: Path, config: dict[str, Any], architecture: str = "NemotronForCausalLM") -> Path:
    """A checkpoint whose config.json says what a user's says, and not what transformers makes of it."""
    given = {name: value for name, value in {**SMALL, **config}.items() if value is not ABSENT}
    built = {name: value for name, value in config.items() if value is not ABSENT}
    for name in (name for name, value in config.items() if value is ABSENT):
        built[name] = {"num_key_value_heads": SMALL["num_attention_heads"]}.get(name)
    write_checkpoint(directory, architecture=architecture, **built)
    raw = {"model_type": "nemotron", "architectures": [architecture], **given}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def assert_passed(result: ExportResult, *limits: float) -> None:
    assert result.manifest.parity is not None
    assert result.manifest.parity.passed
    found = {comparison.limit for comparison in result.manifest.parity.comparisons if comparison.metric == "max_abs"}
    assert found == set(limits or (LIMIT,))


def operators(bundle: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(bundle / "model.onnx", load_external_data=False).graph.node)


def both_targets(checkpoint: Path, directory: Path, case: Case) -> None:
    options = {"max_length": case.max_length}
    ours = export(checkpoint, directory / "onnxruntime", ExportOptions(**options))
    assert_passed(ours)
    layers = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
    counts = operators(ours.bundle)
    assert counts["GroupQueryAttention"] == layers
    assert counts["RotaryEmbedding"] == (2 * layers if case.apart else 0)
    assert bool(ours.manifest.lowering.fallbacks) == case.apart
    native = export(checkpoint, directory / "tensorrt", ExportOptions(target="tensorrt", **options))
    assert_passed(native)
    counts = operators(native.bundle)
    assert (counts["Attention"], counts["TensorScatter"], counts["RotaryEmbedding"]) == (layers, 2 * layers, 2 * layers)
    assert native.manifest.lowering.fallbacks == ()
    assert verify(native.bundle, checkpoint, network=True).passed


def marked(name: str, case: Case) -> Any:
    return pytest.param(case, id=name, marks=[] if case.core else [pytest.mark.slow])


@pytest.mark.parametrize("case", [marked(name, case) for name, case in CONFIGURATIONS.items()])
def test_a_configuration_is_exported_to_both_targets(case: Case, tmp_path: Path) -> None:
    both_targets(checkpoint_of(tmp_path / "c", case.config), tmp_path, case)


@pytest.mark.slow
@pytest.mark.parametrize("activation", sorted(set(ACT2FN) - set(LEARNED_ACTIVATIONS)))
def test_an_activation_is_exported_to_both_targets(activation: str, tmp_path: Path) -> None:
    both_targets(checkpoint_of(tmp_path / "c", {"hidden_act": activation, "num_hidden_layers": 1}), tmp_path, Case())


HEADS: dict[str, dict[str, Any]] = {
    "feature-extraction": {},
    "text-classification": {"pad_token_id": 0, "id2label": {"0": "a", "1": "b", "2": "c"}},
    "token-classification": {"num_labels": 5},
    "question-answering": {},
}


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=[] if task == "text-classification" else [pytest.mark.slow]) for task in HEADS],
)
def test_a_head_is_exported_to_both_targets(task: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", HEADS[task], TASKS[task].architecture)
    ours = export(checkpoint, tmp_path / "onnxruntime", ExportOptions())
    assert ours.manifest.task == task
    assert_passed(ours)
    assert operators(ours.bundle)["Attention"] == LAYERS
    assert selftest(ours.bundle).passed
    assert load(ours.bundle).bundle.manifest == ours.manifest
    native = export(checkpoint, tmp_path / "tensorrt", ExportOptions(target="tensorrt"))
    assert_passed(native)
    assert verify(native.bundle, checkpoint, network=True).passed


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("task", HEADS)
def test_a_head_in_16_bit_is_as_near_as_transformers_is(task: str, precision: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", HEADS[task], TASKS[task].architecture)
    result = export(checkpoint, tmp_path / "b", ExportOptions(target="tensorrt", precision=precision))
    assert result.manifest.parity.passed
    assert verify(result.bundle, checkpoint, network=True).passed


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{"pad_token_id": ABSENT}, {"pad_token_id": 96}, {"num_labels": 1}],
    ids=["no pad token", "the last token is padding", "one label"],
)
def test_rows_are_pooled_as_transformers_pools_them(config: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", config, "NemotronForSequenceClassification")
    assert_passed(export(checkpoint, tmp_path / "b", ExportOptions()))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tied", "biases of the attention", "12 of 24 channels rotate", "one key/value head"])
def test_heads_take_the_configurations_too(case: str, tmp_path: Path) -> None:
    task = "text-classification"
    config = {**CONFIGURATIONS[case].config, **HEADS[task]}
    checkpoint = checkpoint_of(tmp_path / "c", config, TASKS[task].architecture)
    assert_passed(export(checkpoint, tmp_path / "b", ExportOptions()))
    native = export(checkpoint, tmp_path / "t", ExportOptions(target="tensorrt"))
    assert verify(native.bundle, checkpoint, network=True).passed


FLAGS: dict[str, dict[str, Any]] = {
    "--inputs embeds": {"inputs": "embeds"},
    "--position-ids": {"position_ids": True},
    "--output-hidden-states": {"output_hidden_states": True},
    "--output-attentions": {"output_attentions": True},
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    CACHED: (GENERATION, {}),
    UNCACHED: (GENERATION, {"cache": False}),
    HEAD: ("text-classification", {}),
}
CARRIED_ONES = [
    pytest.param(target, kind, option, id=f"{target}, {kind}, {option}", marks=[pytest.mark.slow])
    for target, options in CARRIED.items()
    for kind in KINDS
    for option, kinds in options.items()
    if kind in kinds
]
CORE_FORMS = [
    pytest.param("onnxruntime", CACHED, "--inputs embeds", id="embeddings into a cache"),
    pytest.param(
        "onnxruntime", UNCACHED, "--output-attentions", id="attentions without a cache", marks=pytest.mark.slow
    ),
    pytest.param("onnxruntime", CACHED, "--position-ids", id="positions into a cache"),
]


@pytest.mark.parametrize(("target", "kind", "option"), [*CORE_FORMS, *CARRIED_ONES])
def test_what_the_table_ticks_is_exported(target: str, kind: str, option: str, tmp_path: Path) -> None:
    task, flags = KINDS[kind]
    checkpoint = checkpoint_of(tmp_path / "c", HEADS.get(task, {}), TASKS[task].architecture)
    result = export(checkpoint, tmp_path / "b", ExportOptions(target=target, **flags, **FLAGS[option]))
    assert_passed(result)
    assert selftest(result.bundle).passed
    if target == "tensorrt":
        assert verify(result.bundle, checkpoint, network=True).passed


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_text_generation_without_a_cache(target: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", {})
    plain = export(checkpoint, tmp_path / "plain", ExportOptions())
    uncached = export(checkpoint, tmp_path / "b", ExportOptions(target=target, cache=False))
    assert_passed(uncached)
    assert not [value for value in uncached.manifest.graph.inputs if "past" in value.name]
    prompts, options = [[5, 17, 3, 8], [9, 4]], {"greedy": True, "max_new_tokens": 12, "ignore_eos": True}
    expected = load(plain.bundle).generate(prompts, **options)
    found = load(uncached.bundle).generate(prompts, **options)
    assert [row.token_ids for row in found.sequences] == [row.token_ids for row in expected.sequences]
    if target == "tensorrt":
        assert verify(uncached.bundle, checkpoint, network=True).passed


@pytest.mark.slow
def test_everything_at_once(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", {"pad_token_id": 3})
    flags = {name: value for flag in FLAGS.values() for name, value in flag.items()}
    result = export(checkpoint, tmp_path / "b", ExportOptions(cache=False, **flags))
    assert_passed(result)
    names = {comparison.name for comparison in result.manifest.parity.comparisons}
    assert names == {"logits", "hidden_states", "attentions"}
    cases = {comparison.case for comparison in result.manifest.parity.comparisons}
    assert cases == {"padded right", "padded left", "one long row", "given positions"}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [task.architecture for task in TASKS.values()])
def test_features_come_from_a_checkpoint_of_any_head(architecture: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path / "c", {"pad_token_id": 0, "num_labels": 3}, architecture)
    result = export(checkpoint, tmp_path / "b", ExportOptions(task="feature-extraction"))
    assert_passed(result)
    assert {value.name for value in result.manifest.graph.outputs} == {"last_hidden_state"}
