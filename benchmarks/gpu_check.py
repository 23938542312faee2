"""What a machine with an NVIDIA GPU makes of bundles: right or not, and how far from the memory's speed.

    python -m benchmarks.gpu_check [BUNDLE ...]

Runs every backend that is installed: TensorRT, with its own attention and with our kernels, TensorRT-RTX, ONNX
Runtime's CUDA provider without and with captured decode steps. Without a bundle the trained checkpoint is exported for
both targets (needs the extra `export`). Engines that are missing are built, in a copy. Prints one table, and writes
JSON to `benchmarks/results/`. Exit code 1 where something is wrong, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.gpu_report import Result, report
from runtime.bundle import Bundle
from runtime.cuda import Cuda
from runtime.errors import UserError
from runtime.golden import Golden, replay
from runtime.manifest import GOLDEN, MODEL
from runtime.session import Session, open_session
from runtime.tensorrt_api import FLAVORS, import_tensorrt

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CAPTURED = "onnxruntime, captured"  # the CUDA provider with decode steps as CUDA graphs
GREEDY_TOKENS = 32
PREFILL_TOKENS = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, print, write; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundles", nargs="*", type=Path, metavar="BUNDLE")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the JSON file")
    options = parser.parse_args(arguments)
    try:
        cuda = Cuda()
        gpu = cuda.gpu()
        if gpu is None:
            raise UserError("no NVIDIA GPU is visible here; run this on the machine that serves, and see nvidia-smi")
        with tempfile.TemporaryDirectory() as scratch:
            bundles = list(prepared(options.bundles, Path(scratch)))
            bandwidth = copy_bandwidth(cuda)
            results = [check(bundle, backend, bandwidth) for bundle in bundles for backend in backends(bundle)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(gpu, bandwidth, results, options.results)
    return 0 if all(result.passed for result in results) else 1


def prepared(given: Sequence[Path], scratch: Path) -> Iterator[Path]:
    """Copies of the bundles, with an engine of every flavor that is installed."""
    for number, path in enumerate(given or exported(scratch)):
        copy = scratch / f"{number}-{path.name}"
        shutil.copytree(path, copy)
        manifest = Bundle.open(copy).manifest
        for flavor in FLAVORS if manifest.target == "tensorrt" else ():
            if any(engine.flavor == flavor for engine in manifest.engines):
                continue
            try:
                import_tensorrt(flavor)
                from exporter.engine import build
                from exporter.engine_options import BuildOptions

                build(copy, BuildOptions(flavor=flavor, max_seq_len=min(512, manifest.max_length)))
            except UserError as error:
                print(f"skipped: {flavor} for {path.name} ({error})", file=sys.stderr)
        yield copy
        if manifest.target == "tensorrt" and manifest.activations != "fp32":
            yield from with_kernels(path, scratch / f"{copy.name}-attention-plugin")


def with_kernels(path: Path, place: Path) -> Iterator[Path]:
    """A copy of the bundle whose engine holds the attention kernels, where TensorRT and Triton are installed."""
    from exporter.engine import build
    from exporter.engine_options import BuildOptions

    shutil.copytree(path, place)
    capacity = min(512, Bundle.open(place).manifest.max_length)
    try:
        build(place, BuildOptions(flavor="tensorrt", attention="plugin", max_seq_len=capacity, force=True))
        yield place
    except UserError as error:
        print(f"skipped: attention kernels for {path.name} ({error})", file=sys.stderr)


def exported(scratch: Path) -> list[Path]:
    """The trained checkpoint for both targets."""
    from exporter.export import ExportOptions, export

    recipe = scratch / "int4-fp16.toml"
    recipe.write_text('activations = "fp16"\n', encoding="utf-8")
    options = [
        ExportOptions(target="onnxruntime", precision="fp16"),
        ExportOptions(target="onnxruntime", precision="int4", recipe=str(recipe)),
        *(ExportOptions(target="tensorrt", precision=precision) for precision in ("fp32", "fp16", "bf16")),
    ]
    checkpoint = ROOT / "artifacts" / "tiny-nemotron"
    return [export(checkpoint, scratch / f"{o.target}-{o.precision}", o).bundle for o in options]


def backends(path: Path) -> list[str]:
    """What can run a bundle here: flavors of its engines, then ONNX Runtime's CUDA provider where it is installed."""
    manifest = Bundle.open(path).manifest
    found = list(dict.fromkeys(engine.flavor for engine in manifest.engines))
    try:
        import onnxruntime
    except ImportError:
        return found
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return found
    if manifest.target == "onnxruntime":  # fp32 attention has no kernel on CUDA, bf16 none on the CPU to compare with
        return [*found, *(["onnxruntime", CAPTURED] if manifest.activations == "fp16" else [])]
    return [*found, *(["onnxruntime"] if manifest.precision in ("fp16", "fp32") else [])]


def check(path: Path, backend: str, bandwidth: float) -> Result:
    """Everything about one bundle on one backend; what fails is in the result."""
    bundle = Bundle.open(path)
    result = Result(path.name, bundle.manifest.precision, backend, activations=bundle.manifest.activations)
    try:
        session = opened(bundle, backend)
        result.backend, result.version = session.backend, session.version
        if backend == CAPTURED:
            result.backend += ", captured"
            result.uncaptured_equal = equal_tokens(session, opened(bundle, "onnxruntime"))
        result.causality_error = causality_error(session)
        if bundle.has(GOLDEN):
            result.golden = [row.to_json() for row in replay(session, Golden.load(bundle.file(GOLDEN)))]
        result.greedy_equal = compare_greedy(bundle, session)
        result.prefill_ms, result.decode_ms = times(session)
        # Rounded for ONNX Runtime, the embedding is too.
        if bundle.manifest.target == "tensorrt" or not bundle.manifest.quantization:
            result.roofline_ms = 1e3 * bytes_per_step(bundle, session) / bandwidth
    except UserError as error:
        result.failure = str(error)
    return result


def opened(bundle: Bundle, backend: str) -> Session:
    """A session of one row on a backend of `backends`."""
    if backend not in ("onnxruntime", CAPTURED):
        return open_session(bundle, backend=backend, slots=1, capacity=8)
    return open_session(bundle, backend="onnxruntime", device="cuda", slots=1, capacity=8, capture=backend == CAPTURED)


def bytes_per_step(bundle: Bundle, session: Session) -> int:
    """What a decode step of one row reads: the weights but the embedding, of which it gathers a row, and the cache."""
    files, geometry = bundle.manifest.files, bundle.cache_geometry
    item = 4 if bundle.manifest.precision == "fp32" else 2
    weights = sum(record.bytes for name, record in files.items() if name.startswith(f"{MODEL}.data"))
    tied = bool(bundle.config.get("tie_word_embeddings"))
    embedding = 0 if tied else bundle.vocab_size * int(bundle.config["hidden_size"]) * item
    cache = geometry.layers * 2 * geometry.kv_heads * session.max_capacity * geometry.head_dim * item
    return weights - embedding + cache


def causality_error(loaded: Session) -> float:
    """How far a prefill of 3 into capacity 8 is from the same tokens alone: the largest |Δ logit|.

    A prompt's first token is right under any reading of lower-right; so is the last. Were the corner counted from the
    static capacity, the first two tokens of three would see those after them.
    """
    tokens, nothing = np.array([[5, 17, 3]]), np.zeros(1, np.int64)
    together = loaded.reopen(slots=1, capacity=8).step(tokens, np.array([3]), nothing, keep=3)[0]
    alone = [loaded.reopen(slots=1, capacity=8).step(tokens[:, :n], np.array([n]), nothing)[0, 0] for n in (1, 2, 3)]
    difference = np.abs(together - np.stack(alone))
    return float(difference.max()) if np.isfinite(difference).all() else float("inf")


def compare_greedy(bundle: Bundle, loaded: Session) -> str:
    """The first greedy tokens against those of ONNX Runtime on the CPU; 16 bits need not agree on all."""
    if bundle.manifest.precision == "bf16":
        return "not compared: no CPU kernels"
    try:
        reference = open_session(bundle, backend="onnxruntime", device="cpu", slots=1, capacity=1)
    except UserError as error:
        return f"not compared: {error}"
    return equal_tokens(loaded, reference)


def equal_tokens(one: Session, other: Session) -> str:
    """How many of the first greedy tokens two sessions agree on."""
    ours, theirs = greedy(one), greedy(other)
    equal = next((n for n, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), len(ours))
    return f"{equal}/{len(ours)}"


def greedy(loaded: Session) -> list[int]:
    """The tokens that follow a few."""
    session = loaded.reopen(slots=1, capacity=GREEDY_TOKENS + 4)
    fed, past, found = np.array([[1, 40, 50, 60]]), 0, []
    for _ in range(GREEDY_TOKENS):
        logits = session.step(fed, np.array([fed.shape[1]]), np.array([past]))
        past += fed.shape[1]
        found.append(int(logits[0, -1].argmax()))
        fed = np.array([found[-1:]])
    return found


def times(loaded: Session) -> tuple[float, float]:
    """Milliseconds of a prefill and of a decode step, batch 1: medians, logits on the host included."""
    length = min(PREFILL_TOKENS, loaded.max_capacity - 64)
    if length < 1:
        raise UserError(
            f"a capacity of {loaded.max_capacity} tokens is too small to time 64 decode steps; build larger"
        )
    session = loaded.reopen(slots=1, capacity=length + 64)
    prompt = np.full((1, length), 5)
    one = np.array([1])

    def seconds(work: Any) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    prefills = [seconds(lambda: session.step(prompt, one * length, one - 1)) for _ in range(8)]
    decodes = [seconds(lambda n=n: session.step(prompt[:, :1], one, one * (length + n))) for n in range(64)]
    return 1e3 * median(prefills[3:]), 1e3 * median(decodes[8:])


def copy_bandwidth(cuda: Cuda, size: int = 2**28) -> float:
    """Bytes a second that a copy on the device reads and writes: the roof that decoding can reach."""
    source, target, stream = cuda.allocate(size), cuda.allocate(size), cuda.stream()
    kind = cuda.api.cudaMemcpyKind.cudaMemcpyDeviceToDevice
    best = float("inf")
    for _ in range(5):
        stream.wait()
        started = time.perf_counter()
        for _ in range(8):
            cuda("cudaMemcpyAsync", target.address, source.address, size, kind, stream.handle)
        stream.wait()
        best = min(best, (time.perf_counter() - started) / 8)
    return 2 * size / best


if __name__ == "__main__":
    sys.exit(main())
