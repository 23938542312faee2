"""What llama.cpp's quantisations cost the trained checkpoint: bits per weight, perplexity, divergence from fp32.

    python -m benchmarks.llama_cpp --llama DIR [--build DIR] [--types TYPE ...] [--results FILE]

DIR is a checkout of llama.cpp, built as shared libraries in DIR/build unless `--build` says where, for instance by

    cmake -S DIR -B DIR/build -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF
    cmake --build DIR/build --target llama llama-quantize llama-imatrix

A TYPE is one of llama-quantize's, `+pure` for all matrices in that type and `+imatrix` for an importance matrix from
the checkpoint's calibration text (both, if both follow). Needs the extra `export`, a C++ compiler, and what DIR/gguf-py
imports. The checkpoint is a plain Nemotron with a byte-level BPE tokenizer and its two texts.

Held-out documents become one stream of tokens, `<s>` document `</s>`, cut into windows of 256 that are run each by
itself: the first 16, and all. Every type is measured twice: as llama.cpp runs it on the CPU, where activations are
rounded to 8 bits wherever weights are quantised, and `weights alone`: dequantised to float32. Exit code 1 where
llama.cpp's float32 is not transformers'; nothing else would then mean anything.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHECKPOINT = Path(__file__).parents[1] / "artifacts" / "tiny-nemotron"
PROGRAM = Path(__file__).with_name("llama_logits.cpp")
TYPES = (
    *("F32", "F16", "Q8_0", "Q6_K", "Q4_K_M", "Q4_K_M+imatrix", "Q4_K_S", "Q4_K_S+pure", "Q4_0", "Q4_0+pure"),
    *("Q4_1", "Q4_1+pure", "IQ4_NL", "IQ4_NL+pure", "IQ4_XS", "IQ4_XS+imatrix", "IQ4_XS+pure"),
)
WINDOW, FIRST = 256, 16
END = "</s>"
TOLERANCE = 1e-3  # of logits that two programs compute in float32

Floats = NDArray[np.float64]


@dataclass
class Llama:
    """A checkout, its build, and the program made against both."""

    checkout: Path
    build: Path
    scratch: Path
    threads: int
    version: str = ""
    commit: str = ""

    def compile(self) -> None:
        """Make the program that gives logits; its libraries are found wherever the build has them."""
        found = {path.parent for name in ("llama", "ggml-base") for path in self.build.rglob(f"lib{name}.*")}
        folders = sorted(folder for folder in found if folder.name != "CMakeFiles")
        headers = [f"-I{self.checkout / part}" for part in ("include", "ggml/include")]
        libraries = [flag for folder in folders for flag in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
        command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O2", *headers, PROGRAM, "-o", self._program]
        _run(*command, *libraries, "-lllama", "-lggml", "-lggml-base")

    def logits(self, model: Path, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits of windows of tokens: windows × positions × vocabulary."""
        given, answer = self.scratch / "tokens.bin", self.scratch / "logits.bin"
        tokens.tofile(given)
        printed = _run(self._program, model, given, tokens.shape[1], answer, self.threads)
        self.version, self.commit = printed.split("\n")[:2]
        return np.fromfile(answer, np.float32).reshape(*tokens.shape, -1)

    def quantised(self, model: Path, kind: str, matrix: Path | None) -> Path:
        """`model` in a type of TYPES."""
        name, *traits = kind.split("+")
        flags: list[object] = ["--pure"] if "pure" in traits else []
        if "imatrix" in traits:
            flags += ["--imatrix", matrix]
        return self._requantised(model, name, *flags)

    def dequantised(self, model: Path) -> Path:
        """`model` with the values its weights stand for, in float32."""
        return self._requantised(model, "F32", "--allow-requantize")

    def importance(self, model: Path, text: str) -> Path:
        """The importance matrix of a text in which special tokens are written out."""
        given, answer = self.scratch / "calibration.txt", self.scratch / "imatrix.gguf"
        given.write_text(text, encoding="utf-8")
        flags = ("--parse-special", "--no-ppl", "-c", WINDOW, "-t", self.threads)
        _run(self._tool("llama-imatrix"), "-m", model, "-f", given, "-o", answer, *flags)
        return answer

    def _requantised(self, model: Path, name: str, *flags: object) -> Path:
        answer = self.scratch / f"{model.stem}-{name}.gguf"
        _run(self._tool("llama-quantize"), *flags, model, answer, name, self.threads)
        return answer

    @property
    def _program(self) -> Path:
        return self.scratch / "llama_logits"

    def _tool(self, name: str) -> Path:
        return next((path for path in self.build.rglob(name) if path.is_file()), self.build / "bin" / name)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, required=True, metavar="DIR", help="a checkout of llama.cpp")
    parser.add_argument(
        "--build", type=Path, metavar="DIR", help="where it is built; build/ in the checkout by default"
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--types", nargs="+", default=TYPES, metavar="TYPE", help=" ".join(TYPES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="a file that the JSON goes into")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(options.llama / "gguf-py"))
    with tempfile.TemporaryDirectory() as scratch:
        llama = Llama(options.llama, options.build or options.llama / "build", Path(scratch), options.threads)
        llama.compile()
        result = measure(llama, options.checkpoint, options.types)
    if options.results:
        options.results.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    report(result)
    return int(result["float32_error"] > TOLERANCE)


def measure(llama: Llama, checkpoint: Path, types: Sequence[str]) -> dict[str, Any]:
    """Every type's figures, beside how far llama.cpp's float32 is from transformers'."""
    import torch
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    tokens = heldout(checkpoint)
    with torch.inference_mode():
        expected = np.concatenate([reference(torch.from_numpy(row[None]).long()).logits.numpy() for row in tokens])
    plain = llama.scratch / "model.gguf"
    write_gguf(reference, checkpoint, plain)
    error = float(np.abs(llama.logits(plain, tokens) - expected).max())

    matrix, rows = None, []
    if any("+imatrix" in kind for kind in types):
        text = "".join(f"{document}{END}<s>" for document in documents(checkpoint / "calibration.txt"))
        matrix = llama.importance(plain, text.removesuffix("<s>"))
    for kind in types:
        model = llama.quantised(plain, kind, matrix)
        row = {"type": kind} | weights(model) | figures(llama.logits(model, tokens), expected, tokens)
        if set(row["tensors"].values()) != {"F32"}:
            row["weights_alone"] = figures(llama.logits(llama.dequantised(model), tokens), expected, tokens)
        rows.append(row)
        print(f"measured {kind}", file=sys.stderr)
    return {
        "schema": 1,
        "llama_cpp": {"version": llama.version, "commit": llama.commit},
        "checkpoint": checkpoint.name,
        "window": WINDOW,
        "windows": {"first": min(FIRST, len(tokens)), "all": len(tokens)},
        "float32_error": error,
        "reference": figures(expected, expected, tokens),
        "results": rows,
    }


def documents(path: Path) -> list[str]:
    """The documents of a text, which blank lines separate."""
    return [document for document in path.read_text(encoding="utf-8").strip().split("\n\n") if document.strip()]


def heldout(checkpoint: Path) -> NDArray[np.int32]:
    """All whole windows of the held-out documents' tokens."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    stream = [token for text in documents(checkpoint / "heldout.txt") for token in [*tokenizer.encode(text).ids, end]]
    return np.array(stream[: len(stream) // WINDOW * WINDOW], np.int32).reshape(-1, WINDOW)


def figures(logits: NDArray[np.float32], expected: NDArray[np.float32], tokens: NDArray[np.int32]) -> dict[str, Any]:
    """Perplexity, divergence from the expected logits in nats, agreement with them: of the first windows, of all."""
    losses, divergences, same = [], [], []
    for ours, theirs, row in zip(logits, expected, tokens, strict=True):
        found, wanted = _log_softmax(ours), _log_softmax(theirs)
        losses.append(-found[np.arange(WINDOW - 1), row[1:]])
        divergences.append((np.exp(wanted) * (wanted - found)).sum(-1))
        same.append(ours.argmax(-1) == theirs.argmax(-1))

    def of(windows: slice) -> dict[str, float]:
        return {
            "perplexity": round(float(np.exp(np.mean(losses[windows]))), 5),
            "kl_mean": round(float(np.mean(divergences[windows])), 8),
            "kl_p99": round(float(np.percentile(divergences[windows], 99)), 7),
            "top1": round(float(np.mean(same[windows])), 5),
        }

    return {"first": of(slice(FIRST)), "all": of(slice(None))}


def weights(model: Path) -> dict[str, Any]:
    """Bytes of a file's tensors, bits per weight of its matrices, and their types, layer by layer where they differ."""
    tensors = import_module("gguf").GGUFReader(model).tensors
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2]
    types: defaultdict[str, list[str]] = defaultdict(list)
    for tensor in sorted(matrices, key=lambda tensor: [int(part) for part in tensor.name.split(".") if part.isdigit()]):
        types[tensor.name.removesuffix(".weight").split(".")[-1]].append(tensor.tensor_type.name)
    bits = 8 * sum(int(tensor.n_bytes) for tensor in matrices) / sum(int(tensor.n_elements) for tensor in matrices)
    return {
        "tensor_bytes": sum(int(tensor.n_bytes) for tensor in tensors),
        "bits_per_weight": round(bits, 4),
        "tensors": {name: found[0] if len(set(found)) == 1 else " ".join(found) for name, found in types.items()},
    }


def write_gguf(model: Any, checkpoint: Path, path: Path) -> None:
    """Write a Nemotron in float32 as llama.cpp's converter does, with its own tokenizer, which that one cannot read."""
    gguf, config = import_module("gguf"), model.config
    writer = gguf.GGUFWriter(path, "nemotron")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(int(config.rope_parameters["partial_rotary_factor"] * config.head_dim))
    writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, gguf.TokenType, json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8")))
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.NEMOTRON, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy() + np.float32(name.endswith("norm.weight"))  # LayerNorm1P's one
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, kinds: Any, tokenizer: dict[str, Any]) -> None:
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_add_bos_token(True)


def report(result: dict[str, Any]) -> None:
    """Two tables on stdout: the first windows, and all."""
    built = result["llama_cpp"]
    print(f"llama.cpp {built['version']} {built['commit']}; float32 off by {result['float32_error']:.2g}")
    for part, count in result["windows"].items():
        print(f"\n{part} {count} windows, perplexity of fp32 {result['reference'][part]['perplexity']}")
        print(f"{'type':16}{'bits':>8}{'ppl':>9}{'kl mean':>11}{'kl p99':>10}{'top1':>9}   weights alone")
        for row in result["results"]:
            alone = _cells(row["weights_alone"][part]) if "weights_alone" in row else ""
            print(f"{row['type']:16}{row['bits_per_weight']:8.3f}{_cells(row[part])}   {alone}".rstrip())


def _cells(found: dict[str, float]) -> str:
    return f"{found['perplexity']:9.4f}{found['kl_mean']:11.6f}{found['kl_p99']:10.5f}{found['top1']:9.4f}"


def _log_softmax(logits: NDArray[np.float32]) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: Floats = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def _run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
