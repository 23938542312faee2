"""What the attention kernels take on a GPU, by a row's length in a cache of a larger capacity, beside torch's.

    python -m benchmarks.kernel_speed [--capacity 131072] [--batches 1 8] [--dtype float16] [--results DIRECTORY]

Needs torch with CUDA, Triton, and a GPU of compute capability 8.0 or later. First the kernels' numbers are compared
with a softmax in fp64. Then a decode step's attention is timed with Minitron-4B's heads, captured as a CUDA graph, with
the GPU's cache flushed before each run, and so is torch's `scaled_dot_product_attention` on a cache cut to the length.
Prints a table, and writes `kernel-speed.json` and `kernel-speed.svg`. Exit code 1 where a number is wrong or a figure
is missed, 2 without such a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any

from benchmarks.kernel_report import MODELS, shape_of
from benchmarks.kernel_speed_report import draw, figures, table
from plugins.kernels.shape import (
    DTYPES,
    MERGE_CONFIGS,
    SPLIT_CONFIGS,
    AttentionShape,
    SplitConfig,
    UnsupportedByKernels,
    check_supported,
)
from plugins.split_attention import partial_shapes
from runtime.errors import UserError

RESULTS = Path(__file__).parent / "results"
MODEL = "minitron-4b"
LENGTHS = tuple(512 << doubling for doubling in range(9))
FLUSHED_BYTES = 256 << 20  # beyond the cache of any GPU of today
RUNS = 30


@dataclass(frozen=True)
class Step:
    """A step of the attention: each row's keys with the step's own, new tokens of each row."""

    shape: AttentionShape
    lengths: tuple[int, ...]
    sequence: int
    capacity: int
    dtype: str = "float16"

    def tensors(self, device: str) -> tuple[Any, ...]:
        """query, cos, sin, key_cache, value_cache, lengths."""
        import torch

        dtype, batch = getattr(torch, self.dtype), len(self.lengths)
        draw_on = torch.Generator(device).manual_seed(0)
        half = self.shape.rotary_dim // 2
        turns = 10000.0 ** -(torch.arange(half, device=device) / half)
        angles = torch.arange(self.capacity, device=device)[:, None] * turns

        def normal(*size: int) -> Any:
            return torch.randn(size, generator=draw_on, device=device, dtype=dtype)

        query = normal(batch, self.sequence, self.shape.heads * self.shape.head_dim)
        caches = (normal(batch, self.shape.kv_heads, self.capacity, self.shape.head_dim) for _ in range(2))
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        return query, angles.cos().to(dtype), angles.sin().to(dtype), *caches, lengths

    def partials(self, device: str) -> tuple[Any, ...]:
        """Where SplitAttention writes; NaN, so that nothing unwritten goes unnoticed."""
        import torch

        sizes = (len(self.lengths), self.sequence, self.shape.heads, self.shape.head_dim, self.capacity)
        return tuple(torch.full(size, torch.nan, device=device) for size in partial_shapes(*sizes))


def run(
    step: Step, inputs: tuple[Any, ...], split: SplitConfig, merge: Any, device: str
) -> tuple[Any, Callable[[], None]]:
    """The context, and what writes it."""
    import torch

    from plugins.kernels.launch import launch_merge, launch_split

    partials, context = step.partials(device), torch.empty_like(inputs[0])

    def work() -> None:
        launch_split(inputs, partials, step.shape, split)
        launch_merge(partials, inputs[-1], context, step.shape, merge)

    return context, work


def rotated(step: Step, inputs: tuple[Any, ...]) -> Any:
    """The query [batch, heads, sequence, head_dim], rotated by its position and rounded."""
    import torch

    query, cos, sin, *_ = inputs
    shape, half = step.shape, step.shape.rotary_dim // 2
    starts = inputs[-1].long() - step.sequence
    positions = starts[:, None] + torch.arange(step.sequence, device=query.device)
    x = query.unflatten(-1, (shape.heads, shape.head_dim)).transpose(1, 2).double()
    c, s = cos[positions][:, None].double(), sin[positions][:, None].double()
    first, second, rest = x.split((half, half, shape.head_dim - 2 * half), -1)
    return torch.cat((first * c - second * s, second * c + first * s, rest), -1).to(query.dtype)


def expected(step: Step, inputs: tuple[Any, ...]) -> Any:
    """The context in fp64, [batch, sequence, heads·head_dim]."""
    import torch

    _, _, _, keys, values, lengths = inputs
    q = rotated(step, inputs).double()
    context = torch.empty_like(q)
    for row, kv_head in product(range(len(lengths)), range(step.shape.kv_heads)):
        length = int(lengths[row])
        heads = slice(kv_head * step.shape.group, (kv_head + 1) * step.shape.group)
        scores = q[row, heads] @ keys[row, kv_head, :length].double().T * step.shape.scale
        hidden = torch.ones(step.sequence, length, device=q.device, dtype=torch.bool).triu(length - step.sequence + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        context[row, heads] = weights @ values[row, kv_head, :length].double()
    return context.transpose(1, 2).flatten(2)


def cases(dtype: str, capacity: int) -> Iterator[Step]:
    """Every model's heads: one token, rows of unequal length, a chunk, a prefill that fills the cache."""
    for model in MODELS.values():
        shape = shape_of(model)
        short = min(capacity, 700)
        yield Step(shape, (1, short, short // 2), 1, short, dtype)
        yield Step(shape, (short, short - 9), min(65, short - 9), short, dtype)
        yield Step(shape, (min(capacity, 300),), min(capacity, 300), min(capacity, 300), dtype)
    yield Step(shape_of(MODELS[MODEL]), (capacity,), 1, capacity, dtype)


def wrong(steps: Sequence[Step], device: str) -> list[str]:
    """What differs from fp64 by more than two units in the last place of the context's scale, for every block size."""
    import torch

    told = []
    for step in steps:
        inputs = step.tensors(device)
        meant = expected(step, inputs)
        greatest = meant.abs().max().to(inputs[0].dtype)
        unit = float(torch.nextafter(greatest, torch.full_like(greatest, torch.inf)) - greatest)
        for split, merge in zip(SPLIT_CONFIGS[step.shape.head_dim], cycle(MERGE_CONFIGS), strict=False):
            context, work = run(step, inputs, split, merge, device)
            work()
            error = float((context.double() - meant).abs().max()) / unit
            if not error <= 2:
                told.append(f"{error:.1f} units in the last place: {step}, {split}, {merge}")
    return told


def milliseconds(work: Callable[[], Any], flushed: Any) -> float:
    """The median of runs as a CUDA graph, each from a flushed cache."""
    import torch

    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and allocates
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(RUNS)]
    for begin, end in events:
        flushed.zero_()
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def copy_bandwidth(flushed: Any) -> float:
    """Bytes a second that a copy on the device reads and writes."""
    import torch

    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source), flushed) / 1e3)


def timed(batch: int, capacity: int, dtype: str, flushed: Any) -> Iterator[dict[str, Any]]:
    """A row for each length: milliseconds of the fastest block sizes and of torch's attention, bytes to read."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    shape = shape_of(MODELS[MODEL])
    step = Step(shape, (capacity,) * batch, 1, capacity, dtype)
    inputs = step.tensors("cuda")
    *_, keys, values, lengths = inputs
    for length in (length for length in LENGTHS if length <= capacity):
        lengths.fill_(length)
        found = {}
        for pair in product(SPLIT_CONFIGS[shape.head_dim][:2], MERGE_CONFIGS):
            _, work = run(step, inputs, *pair, "cuda")
            found[pair] = milliseconds(work, flushed)
        fastest = min(found, key=lambda pair: found[pair])
        cut = keys[:, :, :length].contiguous(), values[:, :, :length].contiguous()
        query = torch.randn(batch, shape.heads, 1, shape.head_dim, dtype=keys.dtype, device="cuda")

        def torch_attends(query: Any = query, cut: tuple[Any, Any] = cut) -> Any:
            return scaled_dot_product_attention(query, *cut, scale=shape.scale, enable_gqa=True)

        yield {
            "batch": batch,
            "length": length,
            "milliseconds": found[fastest],
            "torch_milliseconds": milliseconds(torch_attends, flushed),
            "bytes": 2 * batch * shape.kv_heads * length * shape.head_dim * keys.element_size(),
            "config": repr(fastest),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, time, print, write; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_speed", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--capacity", type=int, default=LENGTHS[-1], help="of the cache, in tokens")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the two files")
    given = parser.parse_args(arguments)
    try:
        device = gpu(given.dtype)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told = [line for dtype in DTYPES for line in wrong(list(cases(dtype, given.capacity)), "cuda")]
    if told:
        print("\n".join(told), file=sys.stderr)
        return 1
    import torch

    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    report: dict[str, Any] = {
        "schema": 1,
        "gpu": device,
        "model": MODEL,
        "dtype": given.dtype,
        "capacity": given.capacity,
    }
    report["copy_bytes_per_s"] = copy_bandwidth(flushed)
    report["rows"] = [row for batch in given.batches for row in timed(batch, given.capacity, given.dtype, flushed)]
    report["figures"] = figures(report)
    (given.results / "kernel-speed.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, given.results / "kernel-speed.svg")
    print(table(report))
    return int(not all(figure["met"] for figure in report["figures"]))


def gpu(dtype: str) -> str:
    """The GPU's name.

    Raises:
        UserError: torch, Triton or a GPU that the kernels run on is missing.
    """
    try:
        import torch
        import triton  # noqa: F401 - its absence is what is asked
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; install nemotron-export[export,kernels]") from error
    if not torch.cuda.is_available():
        raise UserError("torch sees no NVIDIA GPU; run this where one is, with a build of torch for CUDA")
    try:
        check_supported(shape_of(MODELS[MODEL]), dtype, torch.cuda.get_device_capability())
    except UnsupportedByKernels as error:
        raise UserError(f"{torch.cuda.get_device_name()}: {error}") from error
    return str(torch.cuda.get_device_name())


if __name__ == "__main__":
    sys.exit(main())
