"""Bundles of graphs without a cache, built by hand: small enough to be recomputed in numpy, one row at a time."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from runtime.bundle import describe_files
from runtime.contract import attentions_name, hidden_states_name
from runtime.golden_forward import ForwardCase, GoldenForward
from runtime.manifest import Graph, Manifest, Source, TensorSpec

WORDS = [
    *("<unk>", "<s>", "</s>", "<pad>", "who", "is", "what", "red", "the", "sun", "mars", "moon", "a", "planet"),
    *("star", "old", "cold", "hot", "big", "small", "far", "near"),
]
VOCAB, HIDDEN, MAX_LENGTH = len(WORDS), 8, 24
BOS, SEPARATOR, PAD = 1, 2, 3
LABELS = {"text-classification": 3, "token-classification": 5}


@dataclass(frozen=True)
class Toy:
    """A model whose hidden state is tanh of the sum of what came before, padding left out; the head is one matrix.

    With `positions` a row of a table is added to each embedding; with `pad_token_id` a text's class is read at its
    last token that is another, else at the last that the mask calls real.
    """

    task: str
    labels: int = 0
    target: str = "onnxruntime"
    positions: bool = False
    embeds: bool = False
    extras: bool = False
    pad_token_id: int | None = PAD
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Columns of the head's matrix."""
        heads = {"question-answering": 2, "text-generation": VOCAB, "feature-extraction": 0}
        return heads.get(self.task, self.labels or LABELS.get(self.task, 0))

    def weights(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embeddings [vocab, hidden], positions [max_length, hidden] and head [hidden, width], always the same."""
        random = np.random.default_rng(7)
        shapes = (VOCAB, HIDDEN), (MAX_LENGTH, HIDDEN), (HIDDEN, self.width)
        embeddings, positions, head = (random.normal(size=shape).astype(np.float32) for shape in shapes)
        return embeddings, positions * np.float32(self.positions), head * 2

    def hidden(self, ids: list[int]) -> np.ndarray:
        """The oracle: hidden states of one row without padding, [sequence, hidden]."""
        embeddings, positions, _ = self.weights()
        return np.tanh(np.cumsum(embeddings[ids] + positions[: len(ids)], 0) / 2)

    def logits(self, ids: list[int]) -> np.ndarray:
        """The oracle: what the head says at each token of one row, [sequence, width]."""
        return self.hidden(ids) @ self.weights()[2]

    def write(self, directory: Path, *, pair: bool = True, golden: bool = False) -> Path:
        """A whole bundle: graph, tokenizer of one word a token, configuration, and golden cases if wanted."""
        directory.mkdir(parents=True)
        onnx.save(self.graph(), directory / "model.onnx")
        write_words(directory, pair=pair)
        config = {"model_type": "nemotron", "vocab_size": VOCAB, "pad_token_id": self.pad_token_id, "eos_token_id": 2}
        if self.labels:
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(self.labels)}
        elif self.task in LABELS:
            config["num_labels"] = LABELS[self.task]
        (directory / "config.json").write_text(json.dumps(config | self.config))
        if self.embeds:
            np.save(directory / "embed_tokens.npy", self.weights()[0])
        if golden:
            self.golden().save(directory / "golden.npz")
        inputs, outputs = self.specs()
        Manifest(
            tool="nemotron-export test", created="2026-01-01T00:00:00Z",
            source=Source(name="toy", fingerprint="0" * 64), task=self.task, target=self.target, precision="fp32",
            opset=21, max_length=MAX_LENGTH, graph=Graph(inputs=tuple(inputs), outputs=tuple(outputs)),
            files=describe_files(directory),
        ).save(directory)  # fmt: skip
        return directory

    def specs(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """The graph's inputs and outputs, as its contract has them."""

        def spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
            return TensorSpec(name=name, dtype=dtype, shape=shape)

        rows = ("batch", "sequence")
        ids = spec("inputs_embeds", "float32", *rows, HIDDEN) if self.embeds else spec("input_ids", "int64", *rows)
        inputs = [ids, spec("attention_mask", "int64", *rows)]
        inputs += [spec("position_ids", "int64", *rows)] if self.positions else []
        if self.task == "text-generation":
            indices = spec("logits_indices", "int64", "batch", "kept")
            inputs += [spec("logits_to_keep", "int64", 1) if self.target == "onnxruntime" else indices]
        kept = 1 if self.target == "onnxruntime" else "kept"
        outputs = {
            "feature-extraction": [spec("last_hidden_state", "float32", *rows, HIDDEN)],
            "text-classification": [spec("logits", "float32", "batch", self.width)],
            "token-classification": [spec("logits", "float32", *rows, self.width)],
            "question-answering": [spec(name, "float32", *rows) for name in ("start_logits", "end_logits")],
            "text-generation": [spec("logits", "float32", "batch", kept, VOCAB)],
        }[self.task]
        if self.extras:
            outputs.append(spec(hidden_states_name(0), "float32", *rows, HIDDEN))
            outputs.append(spec(attentions_name(0), "float32", "batch", 1, "sequence", "sequence"))
        return inputs, outputs

    def graph(self) -> onnx.ModelProto:
        """The model in ONNX."""
        nodes: list[onnx.NodeProto] = []
        weights: list[onnx.TensorProto] = []

        def weight(value: Any, dtype: Any = np.int64) -> str:
            weights.append(numpy_helper.from_array(np.asarray(value, dtype), f"w{len(weights)}"))
            return weights[-1].name

        def add(op: str, *inputs: str, out: str = "", **attributes: Any) -> str:
            nodes.append(helper.make_node(op, inputs, [out or f"v{len(nodes)}"], **attributes))
            return nodes[-1].output[0]

        embeddings, positions, head = (weight(array, np.float32) for array in self.weights())
        one, two = weight([1]), weight([2])
        embedded = "inputs_embeds" if self.embeds else add("Gather", embeddings, "input_ids")
        if self.positions:
            embedded = add("Add", embedded, add("Gather", positions, "position_ids"))
        real = add("Cast", "attention_mask", to=TensorProto.FLOAT)
        total = add("CumSum", add("Mul", embedded, add("Unsqueeze", real, two)), weight(1))
        last = {"out": "last_hidden_state"} if self.task == "feature-extraction" else {}
        hidden = add("Tanh", add("Mul", total, weight(0.5, np.float32)), **last)
        if self.extras:
            add("Identity", embedded, out=hidden_states_name(0))
            pairs = add("Mul", add("Unsqueeze", real, one), add("Unsqueeze", real, two))
            add("Unsqueeze", pairs, one, out=attentions_name(0))
        columns = add("Range", weight(0), add("Squeeze", add("Shape", "attention_mask", start=1, end=2)), weight(1))
        match self.task:
            case "token-classification":
                add("MatMul", hidden, head, out="logits")
            case "question-answering":
                both = add("MatMul", hidden, head)
                for column, name in enumerate(("start_logits", "end_logits")):
                    add("Gather", both, weight(column), axis=2, out=name)
            case "text-classification":
                counts = "attention_mask"
                if self.pad_token_id is not None:
                    same = add("Equal", "input_ids", weight(self.pad_token_id))
                    counts = add("Cast", add("Not", same), to=TensorProto.INT64)
                index = add("ReduceMax", add("Mul", columns, counts), one, keepdims=1)
                add("MatMul", add("GatherND", hidden, index, batch_dims=1), head, out="logits")
            case "text-generation":
                indices = "logits_indices"
                if self.target == "onnxruntime":
                    end = add("ReduceMax", add("Mul", columns, "attention_mask"), one, keepdims=1)
                    keep = add("Squeeze", "logits_to_keep")
                    back = add("Sub", add("Range", weight(0), keep, weight(1)), add("Sub", keep, weight(1)))
                    indices = add("Max", add("Add", end, back), weight([0]))
                    weights.append(numpy_helper.from_array(np.array([1]), "logits_to_keep"))
                rows = add("GatherND", hidden, add("Unsqueeze", indices, two), batch_dims=1)
                add("MatMul", rows, head, out="logits")

        def value(spec: TensorSpec) -> onnx.ValueInfoProto:
            dtype = helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
            return helper.make_tensor_value_info(spec.name, dtype, spec.shape)

        inputs, outputs = ([value(spec) for spec in specs] for specs in self.specs())
        graph = helper.make_graph(nodes, "toy", inputs, outputs, weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def golden(self) -> GoldenForward:
        """Two unequal rows, padded on the right and on the left, by the oracle; garbage where there is padding."""
        rows = [[BOS, 9, 5, 7, 10], [BOS, 4, 8]]
        cases = []
        for case, right in (("right-padded", True), ("left-padded", False)):
            ids, mask = np.full((2, 5), PAD), np.zeros((2, 5), np.int64)
            states = np.full((2, 5, HIDDEN), 1e6, np.float32)
            logits = np.full((2, 5, self.width), np.nan, np.float32)
            pooled = np.zeros((2, self.width), np.float32)
            for row, tokens in enumerate(rows):
                where = slice(len(tokens)) if right else slice(5 - len(tokens), 5)
                ids[row, where], mask[row, where] = tokens, 1
                states[row, where], logits[row, where] = self.hidden(tokens), self.logits(tokens)
                pooled[row] = self.logits(tokens)[-1]
            outputs = {
                "feature-extraction": {"last_hidden_state": states},
                "text-classification": {"logits": pooled},
                "token-classification": {"logits": logits},
                "question-answering": {"start_logits": logits[..., :1], "end_logits": logits[..., 1:]},
            }[self.task]
            if self.task == "question-answering":
                outputs = {name: array[..., 0] for name, array in outputs.items()}
            if self.extras:
                outputs[hidden_states_name(0)] = self.weights()[0][ids]
                outputs[attentions_name(0)] = np.ones((2, 1, 5, 5), np.float32)
            cases.append(ForwardCase(case, ids, mask, outputs))
        return GoldenForward(1e-4, cases)


def write_words(directory: Path, *, pair: bool = True) -> None:
    """A tokenizer of one word a token; without `pair` its template knows single texts only, as a decoder's may."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A </s> $B" if pair else "$A $B",
        special_tokens=[("<s>", BOS), ("</s>", SEPARATOR)],
    )  # fmt: skip
    tokenizer.save(str(directory / "tokenizer.json"))
