"""A small random Nemotron as transformers runs it, and as a bundle built by hand with onnx.helper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tokenizers
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper

from runtime.bundle import Bundle, describe_files
from runtime.contract import past_names, present_names
from runtime.golden import Golden, GoldenStep
from runtime.manifest import Graph, Manifest, Source, TensorSpec
from runtime.ort_session import OrtSession
from runtime.tokenizer import Tokenizer

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 64, 2, 4, 2, 32, 128
MAX_LENGTH = 96
CORPUS = [
    "Our solar system is the Sun and all that travels around it: planets, moons, comets and dust.",
    "Mars is red with rust. Jupiter's storm is older than any of us. Naïve café, 日本語, emoji 🪐🚀.",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "<{{ message.role }}> {{ message.content | tojson }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def train_tokenizer() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(scope="session")
def toy_tokenizer() -> tokenizers.Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="session")
def reference(toy_tokenizer: tokenizers.Tokenizer) -> transformers.NemotronForCausalLM:
    """The oracle: transformers with eager attention, random weights, fp32."""
    config = transformers.NemotronConfig(
        vocab_size=toy_tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_LENGTH,
        partial_rotary_factor=0.5,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.NemotronForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.12)
    return model


class GraphBuilder:
    """Nodes and weights of the graph that contract.py describes."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def add(self, op: str, *inputs: str, outputs: tuple[str, ...] = (), domain: str = "", **attributes: Any) -> str:
        outputs = outputs or (f"v{len(self.nodes)}",)
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def weight(self, value: Any, dtype: Any = np.float32, name: str = "") -> str:
        name = name or f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value, dtype), name))
        return name

    def linear(self, hidden: str, weight: torch.Tensor) -> str:
        return self.add("MatMul", hidden, self.weight(weight.detach().numpy().T))

    def norm(self, hidden: str, norm: torch.nn.Module) -> str:
        scale, bias = self.weight(norm.weight.detach() + 1), self.weight(norm.bias.detach())
        return self.add("LayerNormalization", hidden, scale, bias, epsilon=norm.eps)


def build_graph(model: transformers.NemotronForCausalLM) -> onnx.ModelProto:
    g = GraphBuilder()
    i64 = np.int64
    one, zero, axis1 = g.weight([1], i64), g.weight([0], i64), g.weight([1], i64)
    counts = g.add("ReduceSum", "attention_mask", axis1, keepdims=0)
    total = g.add("Shape", "attention_mask", start=1, end=2)
    sequence = g.add("Shape", "input_ids", start=1, end=2)
    last = g.add("Sub", counts, one)
    seqlens = g.add("Cast", last, to=TensorProto.INT32)
    total32 = g.add("Cast", g.add("Squeeze", total), to=TensorProto.INT32)
    angles = np.outer(np.arange(MAX_LENGTH), model.model.rotary_emb.inv_freq.numpy())
    cos, sin = g.weight(np.cos(angles)), g.weight(np.sin(angles))
    hidden = g.add("Gather", g.weight(model.model.embed_tokens.weight.detach()), "input_ids")
    for n, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        x = g.norm(hidden, layer.input_layernorm)
        q, k, v = (g.linear(x, p.weight) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        context = g.add(
            "GroupQueryAttention", q, k, v, *past_names(n), seqlens, total32, cos, sin,
            outputs=(f"context{n}", *present_names(n)), domain="com.microsoft", num_heads=HEADS,
            kv_num_heads=KV_HEADS, scale=HEAD_DIM**-0.5, do_rotary=1,
        )  # fmt: skip
        hidden = g.add("Add", hidden, g.linear(context, attention.o_proj.weight))
        up = g.add("Relu", g.linear(g.norm(hidden, layer.post_attention_layernorm), layer.mlp.up_proj.weight))
        hidden = g.add("Add", hidden, g.linear(g.add("Mul", up, up), layer.mlp.down_proj.weight))
    # Each row's last `logits_to_keep` real positions within this step.
    end = g.add("Sub", last, g.add("Sub", total, sequence))
    scalars = [g.weight(np.array(v), i64) for v in (0, 1)]
    keep = g.add("Squeeze", "logits_to_keep")
    back = g.add("Sub", g.add("Range", scalars[0], keep, scalars[1]), g.add("Sub", keep, scalars[1]))
    index = g.add("Max", g.add("Add", g.add("Unsqueeze", end, axis1), back), zero)
    rows = g.add("GatherND", hidden, g.add("Unsqueeze", index, g.weight([2], i64)), batch_dims=1)
    logits = g.linear(g.norm(rows, model.model.norm), model.lm_head.weight)
    first = g.add("Slice", "attention_mask", zero, one, axis1)
    padded = g.add("Unsqueeze", g.add("Equal", first, zero), g.weight([2], i64))
    g.add("Where", padded, g.weight(np.array(np.nan)), logits, outputs=("logits",))
    g.weights.append(numpy_helper.from_array(np.array([1], i64), "logits_to_keep"))

    def value(spec: TensorSpec) -> onnx.ValueInfoProto:
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        return helper.make_tensor_value_info(spec.name, dtype, spec.shape)

    specs = graph_specs(model.config.vocab_size)
    graph = helper.make_graph(
        g.nodes, "toy", [value(s) for s in specs.inputs], [value(s) for s in specs.outputs], g.weights
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def graph_specs(vocab_size: int) -> Graph:
    def cache(names: Any, length: str) -> list[TensorSpec]:
        shape = ("batch", KV_HEADS, length, HEAD_DIM)
        return [TensorSpec(name=name, dtype="float32", shape=shape) for n in range(LAYERS) for name in names(n)]

    return Graph(
        inputs=(
            TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),
            TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "total")),
            *cache(past_names, "past"),
            TensorSpec(name="logits_to_keep", dtype="int64", shape=(1,)),
        ),
        outputs=(
            TensorSpec(name="logits", dtype="float32", shape=("batch", 1, vocab_size)),
            *cache(present_names, "present"),
        ),
    )


def golden_of(model: transformers.NemotronForCausalLM) -> Golden:
    """A prefill of unequal rows and a decode step, by the oracle."""
    tokens = np.array([[1, 40, 50, 60, 70], [1, 90, 80, 0, 0]])
    lengths, next_tokens = np.array([5, 3]), np.array([[33], [44]])
    steps = []
    for case, fed, past in (("prefill", tokens, np.zeros(2, int)), ("decode", next_tokens, lengths)):
        logits = np.empty((2, 1, model.config.vocab_size), np.float32)
        for row in range(2):
            ids = tokens[row, : lengths[row]]
            ids = ids if case == "prefill" else np.append(ids, next_tokens[row])
            with torch.no_grad():
                logits[row, 0] = model(torch.tensor(ids[None])).logits[0, -1].numpy()
        new = lengths if case == "prefill" else np.ones(2, int)
        steps.append(
            GoldenStep.record(case, tokens=fed, lengths=new, past_lengths=past, slots=np.arange(2), logits=logits)
        )
    return Golden(slots=2, capacity=16, limit=1e-4, steps=steps)


def write_manifest(directory: Path, vocab_size: int) -> None:
    Manifest(
        tool="nemotron-export test",
        created="2026-01-01T00:00:00Z",
        source=Source(name="toy", fingerprint="0" * 64),
        task="text-generation",
        target="onnxruntime",
        precision="fp32",
        opset=21,
        max_length=MAX_LENGTH,
        graph=graph_specs(vocab_size),
        files=describe_files(directory),
    ).save(directory)


@pytest.fixture(scope="session")
def bundle_dir(
    tmp_path_factory: pytest.TempPathFactory,
    toy_tokenizer: tokenizers.Tokenizer,
    reference: transformers.NemotronForCausalLM,
) -> Path:
    """A whole bundle. Tests must not write into it: `broken_bundle` is a copy."""
    path = tmp_path_factory.mktemp("bundle") / "toy"
    path.mkdir()
    onnx.save(build_graph(reference), path / "model.onnx")
    toy_tokenizer.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps(reference.config.to_dict(), default=str))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 319]}))
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": None}
    (path / "tokenizer_config.json").write_text(json.dumps(tokens))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    golden_of(reference).save(path / "golden.npz")
    write_manifest(path, reference.config.vocab_size)
    return path


@pytest.fixture(scope="session")
def tokenizer(bundle_dir: Path) -> Tokenizer:
    return Tokenizer(Bundle.open(bundle_dir))


@pytest.fixture
def bundle_copy(bundle_dir: Path, tmp_path: Path) -> Path:
    """A bundle that a test may break."""
    return Path(shutil.copytree(bundle_dir, tmp_path / "copy"))


@pytest.fixture
def session(bundle_dir: Path) -> OrtSession:
    return OrtSession(Bundle.open(bundle_dir), slots=4, capacity=48)
