"""Seconds and memory of our export beside those of other converters, on a random model of 242 million parameters.

    python -m benchmarks.peers [--rounds N] [--llama DIR] [--tools NAME ...] [--results FILE]

Whole processes, in turn, medians of the rounds: `nemotron-export export --no-verify`, the model builder of
onnxruntime-genai, `optimum-cli export onnx` with its own validation, which it has no option against, and, where DIR is
a checkout of llama.cpp, its convert_hf_to_gguf.py (the source distribution of llama-cpp-python has one, under
vendor/llama.cpp). The last two have no int4 of their own: optimum quantises what it has exported, llama.cpp by a
program in C++. Each peer runs in a virtual environment of its own, made once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.child import OURS, ROOT, Measured, measured
from benchmarks.make_checkpoint import TINY
from tests.support.environments import environment, run

RESULTS = Path(__file__).parent / "results" / "peers.json"
PRESET = "242m"
TORCH = "torch==2.13.0"  # one that PyPI's index and the CPU's both have
# What each peer's environment has; optimum needs an older transformers than ours, and has no bounds of ours.
GENAI = ("onnxruntime-genai==0.18.0", "onnxruntime", "onnx-ir", "onnx", "torch", "transformers")
OPTIMUM = ("optimum-onnx[onnxruntime]", "transformers<4.58", TORCH)
LLAMA = ("gguf", "sentencepiece", "torch", "transformers")
SHOWN = ("torch", "transformers", "onnxruntime", "onnxruntime-genai", "optimum-onnx", "gguf", "onnx")


@dataclass(frozen=True)
class Tool:
    """A converter: its environment's executables, None for ours, and what each precision is called by."""

    name: str
    bin: Path | None
    command: tuple[object, ...]
    precisions: dict[str, tuple[str, ...]]

    def convert(self, checkpoint: Path, output: Path, precision: str) -> Measured:
        """Run it in a process of its own."""
        places = {"CHECKPOINT": checkpoint, "OUTPUT": output}
        flags = self.precisions[precision]
        command = [places.get(str(part), part) for part in (*self.command, *flags)]
        return measured(command, ROOT if self.bin is None else output.parent)

    def versions(self) -> dict[str, str]:
        """Of what it is made of."""
        python = sys.executable if self.bin is None else self.bin / "python"
        lines = run([python, "-m", "pip", "list", "--format=freeze"]).splitlines()
        found = dict(line.split("==", 1) for line in lines if "==" in line)
        return {name: found[name] for name in SHOWN if name in found}


def tools(names: Sequence[str], llama: Path | None) -> Iterator[Tool]:
    """The converters by name; llama.cpp's where there is a checkout of it."""
    if "nemotron-export" in names:
        precisions = {name: ("--precision", name) for name in ("fp32", "int4")}
        yield Tool("nemotron-export", None, (*OURS, "export", "CHECKPOINT", "OUTPUT", "--no-verify"), precisions)
    if "onnxruntime-genai" in names:
        bin_ = environment("genai-builder", GENAI)
        builder = (bin_ / "python", "-m", "onnxruntime_genai.models.builder", "-m", "CHECKPOINT", "-o", "OUTPUT")
        yield Tool(
            "onnxruntime-genai", bin_, (*builder, "-e", "cpu"), {name: ("-p", name) for name in ("fp32", "int4")}
        )
    if "optimum-onnx" in names:
        bin_ = environment("optimum", OPTIMUM, constraints=None)
        command = (bin_ / "optimum-cli", "export", "onnx", "--model", "CHECKPOINT", "OUTPUT")
        yield Tool("optimum-onnx", bin_, command, {"fp32": ("--task", "text-generation-with-past")})
    if "llama.cpp" in names and llama is not None:
        bin_ = environment("llama-cpp", LLAMA)
        command = (bin_ / "python", llama / "convert_hf_to_gguf.py", "CHECKPOINT", "--outfile", "OUTPUT")
        yield Tool("llama.cpp", bin_, command, {"fp32": ("--outtype", "f32")})


NAMES = ("nemotron-export", "onnxruntime-genai", "optimum-onnx", "llama.cpp")


def measure(chosen: Sequence[Tool], checkpoint: Path, scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """Every tool in every precision, one after the other, `rounds` times."""
    cases = [(tool, precision) for precision in ("fp32", "int4") for tool in chosen if precision in tool.precisions]
    done: dict[tuple[str, str], list[Measured]] = {(tool.name, precision): [] for tool, precision in cases}
    for _ in range(rounds):
        for tool, precision in cases:
            output = scratch / "output"
            done[tool.name, precision].append(tool.convert(checkpoint, output, precision))
            last = done[tool.name, precision][-1]
            print(f"{tool.name:18} {precision} {json.dumps(last.to_json())}", flush=True)
            output.unlink() if output.is_file() else shutil.rmtree(output)
    return [
        {
            "tool": name,
            "precision": precision,
            "seconds": round(statistics.median(one.seconds for one in ones), 2),
            "cpu_seconds": round(statistics.median(one.cpu_seconds for one in ones), 2),
            "peak_gb": round(statistics.median(one.peak_bytes for one in ones) / 1e9, 3),
            "all_seconds": [round(one.seconds, 2) for one in ones],
        }
        for (name, precision), ones in done.items()
    ]


def write_sentencepiece(checkpoint: Path) -> None:
    """A tokenizer.model, the one form of tokenizer that llama.cpp's converter reads of a Nemotron."""
    script = (
        "import sys, sentencepiece; sentencepiece.SentencePieceTrainer.train(input=sys.argv[1], "
        "model_prefix=sys.argv[2], vocab_size=1000, model_type='bpe', minloglevel=2)"
    )
    run([sys.executable, "-c", script, TINY / "calibration.txt", checkpoint / "tokenizer"])
    (checkpoint / "tokenizer.vocab").unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; exit code 1 where onnxruntime-genai is quicker in a precision."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama", type=Path, metavar="DIR", help="a checkout of llama.cpp")
    parser.add_argument("--tools", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    chosen = list(tools(given.tools, given.llama))
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        checkpoint = scratch / PRESET
        measured([sys.executable, "-m", "benchmarks.make_checkpoint", "--preset", PRESET, checkpoint])
        if given.llama is not None:
            write_sentencepiece(checkpoint)
        rows = measure(chosen, checkpoint, scratch, given.rounds)
    report = {
        "schema": 1,
        "checkpoint": PRESET,
        "rounds": given.rounds,
        "versions": {tool.name: tool.versions() for tool in chosen},
        "not_run": {} if given.llama else {"llama.cpp": "no package installs its converter; give --llama DIR"},
        "results": rows,
    }
    given.results.write_text(json.dumps(report, indent=2) + "\n")
    print(f"\n{'tool':18} {'':5} {'seconds':>8} {'of cores':>8} {'GB':>6}   medians of {given.rounds}")
    for row in rows:
        figures = f"{row['seconds']:8.1f} {row['cpu_seconds']:8.1f} {row['peak_gb']:6.2f}"
        print(f"{row['tool']:18} {row['precision']:5} {figures}")
    return int(_slower(rows))


def _slower(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the builder whose graphs ours stand beside is quicker in some precision."""
    seconds = {(row["tool"], row["precision"]): row["seconds"] for row in rows}
    ours, theirs = NAMES[:2]
    return any(seconds.get((ours, precision), 0.0) > seconds.get((theirs, precision), 1e9) for _, precision in seconds)


if __name__ == "__main__":
    sys.exit(main())
