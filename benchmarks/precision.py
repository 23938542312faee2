"""What each precision and recipe costs the trained checkpoint, by three calibration seeds.

    python -m benchmarks.precision [--only WORD ...] [--windows N] [--results FILE]

Every case is exported, which passes the parity gate and measures perplexity and KL divergence from transformers in fp32
on held-out windows of 256 tokens: all of them, or the first 16 where ONNX Runtime does not run the graph. `scaled
channels` is the same checkpoint, its channels rescaled by random powers of two up to 2^10 with the function unchanged.
`bits_per_weight` counts every byte of the graph's weights. Needs the extras `export` and `cpu`; beside each stand
those of llama.cpp's types in results/llama-cpp.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

TINY = Path(__file__).parents[1] / "artifacts" / "tiny-nemotron"
RESULTS = Path(__file__).parent / "results" / "precision.json"
SEEDS = (0, 1, 2)
MOST_EXPONENT = 10
WINDOW, FIRST = 256, 16
RECIPES = {
    "nearest-128": "block = 128\nsymmetric = false\n",
    "nearest-64-head-int8": 'block = 64\nsymmetric = false\n[layers]\n"lm_head" = "int8"\n',
    "gptq-32": 'method = "gptq"\nblock = 32\nsymmetric = false\n',
    "gptq-128": 'method = "gptq"\nblock = 128\nsymmetric = false\n',
    "scaling-32": "scaling = true\nblock = 32\nsymmetric = false\n",
    "scaling-128": "scaling = true\nblock = 128\nsymmetric = false\n",
    "compact-gptq": 'method = "gptq"\nblock = 128\nsymmetric = true\n',
    "aware-128": 'method = "gptq"\nscaling = true\nblock = 128\nsymmetric = false\n',
}


@dataclass(frozen=True)
class Case:
    """An export, and whether its channels are rescaled before."""

    target: str
    precision: str
    recipe: str = "plain"
    seed: int = 0
    scaled_channels: bool = False
    kv_cache: str | None = None

    @property
    def runs(self) -> bool:
        """Whether ONNX Runtime gives the logits; elsewhere the graph is evaluated, which takes longer."""
        return self.target == "onnxruntime" and self.precision not in ("fp16", "bf16")


def cases() -> Iterator[Case]:
    """What is measured, in order."""
    yield Case("onnxruntime", "int8")
    yield Case("onnxruntime", "fp32", kv_cache="int8")
    nearest = [
        Case("onnxruntime", "int4", name) for name in ("plain", "nearest-128", "nearest-64-head-int8", "compact")
    ]
    parts = [
        Case("onnxruntime", "int4", name)
        for name in ("scaling-32", "gptq-32", "scaling-128", "gptq-128", "compact-gptq")
    ]
    both = [Case("onnxruntime", "int4", name, seed) for name in ("aware", "aware-128", "balanced") for seed in SEEDS]
    yield from (*nearest, *parts, *both)
    for case in (*nearest[:2], *both):
        if case.seed == SEEDS[0]:
            yield replace(case, scaled_channels=True)
    yield Case("tensorrt", "int4")
    yield from (Case("tensorrt", "int4", "aware", seed) for seed in SEEDS)
    yield Case("tensorrt", "fp8")
    for target in ("onnxruntime", "tensorrt"):
        for precision in ("fp16", "bf16"):
            yield Case(target, precision)


def rescale(source: Path, directory: Path, seed: int = 0) -> Path:
    """Write the checkpoint with channels rescaled by random powers of two, in fp32: the function is the same.

    A norm and what reads it; values and the context that query heads make of them; relu² takes the square of a row.
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, directory)
    config = json.loads((source / "config.json").read_text())
    weights = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    random = np.random.default_rng(seed)

    def powers(count: int, most: int = MOST_EXPONENT) -> torch.Tensor:
        return torch.from_numpy(2.0 ** random.integers(-most, most + 1, count)).float()

    def norm(name: str, readers: Sequence[str]) -> None:
        factor = powers(config["hidden_size"])
        weights[f"{name}.weight"] = (weights[f"{name}.weight"] + 1) / factor - 1  # LayerNorm1P
        weights[f"{name}.bias"] /= factor
        for reader in readers:
            weights[f"{reader}.weight"] *= factor

    heads, kv_heads, width = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    for layer in range(config["num_hidden_layers"]):
        inner = f"model.layers.{layer}."
        norm(f"{inner}input_layernorm", [f"{inner}self_attn.{name}_proj" for name in "qkv"])
        norm(f"{inner}post_attention_layernorm", [f"{inner}mlp.up_proj"])
        values = powers(kv_heads * width)
        weights[f"{inner}self_attn.v_proj.weight"] /= values[:, None]
        context = values.reshape(kv_heads, 1, width).expand(-1, heads // kv_heads, -1).reshape(-1)
        weights[f"{inner}self_attn.o_proj.weight"] *= context
        rows = powers(config["intermediate_size"], MOST_EXPONENT // 2)
        weights[f"{inner}mlp.up_proj.weight"] *= rows[:, None]
        weights[f"{inner}mlp.down_proj.weight"] /= rows**2
    norm("model.norm", ["lm_head"])
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    return directory


def measure(case: Case, checkpoints: dict[bool, Path], scratch: Path, windows: int) -> dict[str, Any]:
    """Export a case; the figures of its manifest."""
    from exporter.export import ExportOptions, export

    recipe = case.recipe
    if recipe in RECIPES:
        path = scratch / f"{recipe}.toml"
        path.write_text(RECIPES[recipe])
        recipe = str(path)
    options = ExportOptions(
        target=case.target,
        precision=case.precision,
        recipe=None if recipe == "plain" else recipe,
        kv_cache=case.kv_cache,
        calibration_seed=case.seed,
        eval_tokens=WINDOW * (windows if case.runs else FIRST),
        force=True,
    )
    result = export(checkpoints[case.scaled_channels], scratch / "bundle", options)
    quality = result.manifest.quality
    assert quality is not None
    return {
        **{name: value for name, value in vars(case).items() if value is not None},
        "bits_per_weight": round(_bits_per_weight(scratch / "bundle", checkpoints[False]), 3),
        "tokens": quality.tokens,
        "perplexity": round(quality.perplexity, 5),
        "perplexity_increase_percent": round(quality.perplexity_increase, 3),
        **{name: float(f"{getattr(quality, name):.4g}") for name in ("kl_mean", "kl_p99", "top1")},
        "calibration_s": round(result.seconds.get("calibration", 0.0), 1),
    }


def _bits_per_weight(bundle: Path, checkpoint: Path) -> float:
    """Of all parameters: norms and the scales of blocks are among the bytes, rotary tables are not."""
    import onnx_ir as ir
    from safetensors import safe_open

    graph = ir.load(bundle / "model.onnx").graph
    weights = [
        value.const_value
        for name, value in graph.initializers.items()
        if name.startswith(("model.", "lm_head.")) and value.const_value is not None
    ]
    with safe_open(checkpoint / "model.safetensors", "np") as file:
        count = sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return 8 * sum(tensor.nbytes for tensor in weights) / count


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the results after every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="words, all of which a case's name must have")
    parser.add_argument("--windows", type=int, default=100)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        checkpoints = {False: TINY, True: rescale(TINY, scratch / "scaled-channels")}
        for case in cases():
            if not all(word in str(case) for word in given.only):
                continue
            rows.append(measure(case, checkpoints, scratch, given.windows))
            print(json.dumps(rows[-1]), flush=True)
            report = {"schema": 1, "checkpoint": TINY.name, "window": WINDOW, "results": rows}
            given.results.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
