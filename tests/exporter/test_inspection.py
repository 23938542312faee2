"""What is told of a bundle's graph, against onnx and numpy reading the same file, for every form that graphs have."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import onnx
import onnx_ir as ir
import pytest
from checkpoints import write_checkpoint

from exporter.export import ExportOptions, export
from exporter.inspection.drawing import draw_layer
from exporter.inspection.graph import GraphFacts, read_graph
from exporter.inspection.layers import layer_runs, nodes_by_layer
from exporter.inspection.layout import place
from exporter.inspection.tensors import PADDING, component_bytes, tensor_groups
from runtime.bundle import Bundle

SVG = "{http://www.w3.org/2000/svg}"
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "int4 with an int8 cache": {"precision": "int4", "kv_cache": "int8"},
    "tensorrt fp16": {"target": "tensorrt", "precision": "fp16"},
    "tensorrt bf16, linked": {"target": "tensorrt", "precision": "bf16", "weights": "link"},
    "tensorrt fp8": {"target": "tensorrt", "precision": "fp8"},
    "tensorrt int4": {"target": "tensorrt", "precision": "int4"},
    "whole rows": {"cache": False, "output_attentions": True, "output_hidden_states": True},
    "embeddings": {"task": "feature-extraction"},
    "embeddings in": {"inputs": "embeds", "position_ids": True, "precision": "fp16", "output_hidden_states": True},
}
QUICK = ("fp32", "int4 with an int8 cache")  # of the fast tests; each is an export

Exported = Callable[[str], tuple[Bundle, GraphFacts]]


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """`exported(form)`: the trained checkpoint in this form, not gated, and its graph. Each is made once."""
    directory = tmp_path_factory.mktemp("forms")

    def bundle(form: str) -> tuple[Bundle, GraphFacts]:
        path = directory / re.sub(r"\W+", "-", form)
        if not path.exists():
            options = ExportOptions(verify=False, calibration_tokens=256, eval_tokens=64, **FORMS[form])
            export(tiny_checkpoint, path, options)
        opened = Bundle.open(path)
        graph = read_graph(opened, complete=True)
        assert graph is not None
        return opened, graph

    return bundle


def by_form(*cases: tuple[str, ...]) -> list[Any]:
    """Cases that begin with a form, those of the fast tests and slow ones."""
    return [pytest.param(*case, marks=() if case[0] in QUICK else pytest.mark.slow) for case in cases]


@pytest.fixture(params=by_form(*zip(FORMS)))
def form(request: pytest.FixtureRequest, exported: Exported) -> tuple[str, Bundle, GraphFacts]:
    return (request.param, *exported(request.param))


def components(bundle: Bundle, graph: GraphFacts) -> dict[str, int]:
    return component_bytes(graph, {name: record.bytes for name, record in bundle.manifest.files.items()})


def external(bundle: Bundle) -> dict[str, ir.ExternalTensor]:
    """The initializers in data files, as onnx_ir reads them."""
    model = ir.load(bundle.path / "model.onnx")
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, ir.ExternalTensor)}


def test_components_add_up_to_the_data_files_and_their_parts_to_the_tensors(form):
    """A size that is counted twice, or forgotten, shows here."""
    _, bundle, graph = form
    tensors = external(bundle)
    files = {str(tensor.location) for tensor in tensors.values()}
    found = components(bundle, graph)
    assert sum(found.values()) == sum((bundle.path / name).stat().st_size for name in files)
    assert sum(found.values()) - found[PADDING] == sum(tensor.nbytes for tensor in tensors.values())
    assert found["other"] == 0

    def of(*words: str) -> int:
        return sum(t.nbytes for name, t in tensors.items() if any(word in name for word in words))

    assert found["attention"] == of("self_attn.")
    assert found["mlp"] == of("mlp.")
    assert found["norms"] == of("layernorm.", "model.norm.")
    assert found["embedding"] == of("embed_tokens.")
    assert found["head"] == of("lm_head.")


def test_every_layer_has_all_of_its_operators_and_no_other_has_any(form):
    """By the weights' names: 4 layers, of 2 norms and 6 matrices, one attention and 2 residuals each."""
    name, _, graph = form
    layers = nodes_by_layer(graph)
    assert len(layers) == 4
    for index, nodes in enumerate(layers):
        ops = Counter(node.op_type for node in nodes)
        assert ops["LayerNormalization"] == ops["Add"] == 2
        assert ops["MatMul"] + ops["MatMulNBits"] == 6
        assert ops["GroupQueryAttention"] + ops["Attention"] == ops["Relu"] == ops["Mul"] == 1
        assert ops["DequantizeLinear"] == (6 if name in ("tensorrt fp8", "tensorrt int4") else 0)
        read = {value for node in nodes for value in node.inputs if value.startswith("model.layers.")}
        assert {value.split(".")[2] for value in read} == {str(index)}
    whose = [node.outputs[0] for nodes in layers for node in nodes]
    assert len(whose) == len(set(whose))
    weights = {name for name in graph.initializers if name.startswith("model.layers.")}
    assert weights <= {value for nodes in layers for node in nodes for value in node.inputs}


def test_layers_that_are_alike_are_told_once_and_the_last_apart(exported):
    _, graph = exported("fp32")
    first, last = layer_runs(graph, nodes_by_layer(graph))
    assert (first.first, first.last, last.first, last.last) == (0, 2, 3, 3)
    assert first.ops == {
        "LayerNormalization": 2, "MatMul": 6, "com.microsoft::GroupQueryAttention": 1, "Add": 2, "Relu": 1, "Mul": 1,
    }  # fmt: skip
    assert "GroupQueryAttention (4 heads on 2, rotary of 32 channels, cache update inside)" in first.fused
    assert "LayerNormalization (LayerNorm1P, 1 added to its weight) ×2" in first.fused
    assert "Relu, Mul (relu²)" in first.fused
    assert set(last.fused) - set(first.fused) == {"GatherND (tokens whose logits are asked for) ×2"}


@pytest.mark.parametrize(
    ("form", "words"),
    by_form(
        ("int8", "MatMulNBits (int8, blocks of 128, fp32 scales) ×6"),
        ("int4 with an int8 cache", "int8 cache update inside"),
        ("int4 with an int8 cache", "MatMulNBits (int4, blocks of 32, fp32 scales and zero points) ×6"),
        ("tensorrt fp8", "DequantizeLinear (fp8, by channel, fp16 scales) ×6"),
        ("tensorrt int4", "DequantizeLinear (int4, blocks of 128, fp16 scales) ×6"),
        ("tensorrt fp16", "RotaryEmbedding (32 channels) ×2"),
        ("tensorrt fp16", "TensorScatter (cache update) ×2"),
        ("tensorrt fp16", "Attention (causal)"),
        ("whole rows", "Attention (with a mask)"),
        ("embeddings in", "com.microsoft::RotaryEmbedding (32 channels) ×2"),
    ),
)
def test_fused_operators_are_named_with_what_they_do(exported, form, words):
    _, graph = exported(form)
    assert words in " | ".join(layer_runs(graph, nodes_by_layer(graph))[0].fused)


@pytest.mark.parametrize(
    ("form", "group", "words"),
    by_form(
        ("fp32", "q_proj", "fp32"),
        ("tensorrt bf16, linked", "down_proj", "bf16"),
        ("tensorrt fp16", "norms", "fp32"),
        ("tensorrt int4", "embedding", "fp16"),
        ("tensorrt int4", "up_proj", "int4, blocks of 128, fp16 scales"),
        ("tensorrt fp8", "head", "fp8, by channel, fp16 scales"),
        ("int8", "embedding", "int8, blocks of 128, fp32 scales"),
        ("int4 with an int8 cache", "o_proj", "int4, blocks of 32, fp32 scales and zero points"),
        ("int4 with an int8 cache", "cache scales", "fp32"),
        ("fp16", "rotary tables", "fp16"),
    ),
)
def test_each_group_of_tensors_has_its_precision(exported, form, group, words):
    _, graph = exported(form)
    (found,) = [one for one in tensor_groups(graph) if one.name == group]
    assert found.format.words == words
    assert found.tensors == {"norms": 18, "cache scales": 8, "rotary tables": 2, "head": 1, "embedding": 1}.get(
        group, 4
    )


@pytest.mark.slow
def test_a_mixed_recipe_shows_layers_and_groups_apart(tiny_checkpoint, tmp_path):
    recipe = tmp_path / "mixed.toml"
    recipe.write_text('[layers]\n"model.layers.1.mlp" = "int8"\n')
    options = ExportOptions(precision="int4", recipe=str(recipe), verify=False)
    graph = read_graph(Bundle.open(export(tiny_checkpoint, tmp_path / "bundle", options).bundle))
    assert graph is not None
    runs = layer_runs(graph, nodes_by_layer(graph))
    assert [(run.first, run.last) for run in runs] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert any("int8" in line for line in runs[1].fused)
    assert {one.format.dtype: one.tensors for one in tensor_groups(graph) if one.name == "up_proj"} == {
        "int4": 3,
        "int8": 1,
    }


@pytest.mark.parametrize(
    ("architecture", "options", "head"),
    [
        ("NemotronForCausalLM", {"tie_word_embeddings": True}, "lm_head"),
        pytest.param("NemotronForSequenceClassification", {"num_labels": 3}, "score", marks=pytest.mark.slow),
        pytest.param("NemotronForTokenClassification", {"num_labels": 5}, "score", marks=pytest.mark.slow),
        pytest.param("NemotronForQuestionAnswering", {}, "qa_outputs", marks=pytest.mark.slow),
    ],
)
def test_every_head_is_counted_as_one_biases_too_and_none_by_its_name_alone(tmp_path, architecture, options, head):
    checkpoint = write_checkpoint(
        tmp_path / "checkpoint", architecture=architecture, attention_bias=True, mlp_bias=True, **options
    )
    bundle = Bundle.open(export(checkpoint, tmp_path / "bundle", ExportOptions(verify=False)).bundle)
    graph = read_graph(bundle)
    assert graph is not None
    found = components(bundle, graph)
    assert sum(found.values()) == (bundle.path / "model.onnx.data").stat().st_size
    assert {run.last - run.first + 1 for run in layer_runs(graph, nodes_by_layer(graph))} <= {1, 2}
    groups = {one.name: one for one in tensor_groups(graph)}
    assert groups["attention biases"].tensors == 2 * 4
    assert groups["mlp biases"].tensors == 2 * 2
    assert groups["head"].tensors >= 1
    assert groups["embedding"].bytes == 97 * 64 * 4
    if options.get("tie_word_embeddings"):
        assert groups["head"].bytes == groups["embedding"].bytes


def test_a_picture_shows_every_operator_of_the_layer_and_every_edge_between_them(form):
    """Against the graph as onnx reads it: operators, and who reads what within the layer."""
    _, bundle, graph = form
    root = ElementTree.fromstring(draw_layer(graph, bundle.path))
    boxes = {box.get("data-name"): box.get("data-op") for box in root.iter(f"{SVG}g") if box.get("data-name")}
    nodes = nodes_by_layer(graph)[0]
    inside = {name: op for name, op in boxes.items() if op not in ("from outside", "to outside")}
    proto = {
        node.output[0]: node for node in onnx.load(bundle.path / "model.onnx", load_external_data=False).graph.node
    }
    assert Counter(op.rpartition("::")[2] for op in inside.values()) == Counter(node.op_type for node in nodes)
    assert set(inside) == {node.outputs[0] for node in nodes}
    edges = [(edge.get("data-from"), edge.get("data-to")) for edge in root.iter(f"{SVG}path")]
    assert all(source in boxes and target in boxes for source, target in edges)
    makers = {value: name for name in inside for value in proto[name].output}
    read = {(makers[value], name) for name in inside for value in proto[name].input if value in makers}
    assert {edge for edge in edges if edge[0] in inside and edge[1] in inside} == read
    assert len([edge for edge in root.iter(f"{SVG}path") if edge.get("class") == "residual"]) == 2
    told = [edge.findtext(f"{SVG}title") or "" for edge in root.iter(f"{SVG}path")]
    assert all(re.search(r"\w+ \[.*\]", text) for text in told)


def test_a_picture_says_what_matters_of_an_operator(exported):
    bundle, graph = exported("int4 with an int8 cache")
    text = " ".join(ElementTree.fromstring(draw_layer(graph, bundle.path)).itertext())
    for words in (
        "layer 0 of 4 (0–2 are alike)", "num_heads=4, kv_num_heads=2", "kv_cache_bit_width=8", "block_size=32",
        "rope.cos fp32 [512, 16]", "past_key_values.0.key int8 [batch, 2, capacity, 64]", "residual",
        "fp32 [batch, sequence, 256]",
    ):  # fmt: skip
        assert words in text


def test_boxes_of_a_picture_lie_apart_and_within_it(form):
    _, bundle, graph = form
    root = ElementTree.fromstring(draw_layer(graph, bundle.path))
    _, _, width, height = map(float, (root.get("viewBox") or "").split())
    boxes = []
    for box in (rect for rect in root.iter(f"{SVG}rect") if rect.get("class") == "box"):
        x, y, wide, high = (float(box.get(name) or "nan") for name in ("x", "y", "width", "height"))
        boxes.append((x, y, x + wide, y + high))
        assert x >= 0
        assert x + wide < width
        assert y + high < height
    for at, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[at + 1 :]:
            assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top
    assert width < 2600


def test_a_name_that_is_markup_does_not_break_the_picture(exported, tmp_path):
    _, graph = exported("fp32")
    directory = tmp_path / '<b> & "quotes"'
    assert ElementTree.fromstring(draw_layer(graph, directory)).findtext(f"{SVG}title", "").startswith(directory.name)


def test_a_long_edge_goes_round_the_boxes_that_it_passes():
    sizes = dict.fromkeys("abcd", (40.0, 10.0))
    placed = place(sizes, [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")], (10.0, 20.0), passing=6.0)
    assert [placed.centre[name][1] for name in "abcd"] == [0, 30, 60, 90]
    assert [placed.centre[name][0] for name in "abcd"] == pytest.approx([placed.centre["a"][0]] * 4, abs=1e-3)
    x = placed.centre["b"][0]
    passing = placed.routes["a", "d"][1:-1]
    assert len({at for at, _ in passing}) == 1
    assert all(abs(at - x) >= 20 + 10 + 3 for at, _ in passing)


def test_the_json_has_what_the_graph_says(exported, capsys):
    from exporter.cli import run

    bundle, graph = exported("int4 with an int8 cache")
    capsys.readouterr()
    assert run(["inspect", str(bundle.path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["components"] == components(bundle, graph)
    assert [run["first"] for run in report["layers"]] == [0, 3]
    assert {one["group"]: (one["dtype"], one["block"]) for one in report["precision"]}["q_proj"] == ("int4", 32)
