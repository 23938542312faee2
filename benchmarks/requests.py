"""Requests that come and go against static batches and one at a time; and drafts where they can pay and where not.

    python -m benchmarks.requests [--precision P ...] [--directory DIR] [--rounds N] [--results FILE]

Two parts, each in interleaved rounds of which the medians count:

requests: 16 prompts of 20 to 600 random tokens, 10 to 200 new ones each, arriving at random within the time that half
of their tokens take. In a running batch of 8 slots; in static batches of 8 in the order of arrival, each when its last
prompt is there and the batch ahead of it is done; and one after the other. Tokens per second from the first arrival to
the last token. What each request says is compared with what it says alone.

lookup: text with and without drafts, the same tokens asked of both. Once greedy from weights that copy: their head is
permuted and their layers hardly speak, so that each token has one that follows it and the text goes round in a circle
which the prompt has been through; every draft holds. And once sampled at temperature 1, which repeats nothing.

The model is the 242m preset, in int4 and fp32 by default: what a batch gains depends on whether memory or products take
a step's time, which is the weights' precision and the processor. Exit code 1 where a limit is passed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.child import OURS, measured
from runtime import load
from runtime.request import Request
from runtime.text_generation import TextGenerator

RESULTS = Path(__file__).parent / "results" / "requests.json"
PRESET = "242m"
SLOTS, REQUESTS = 8, 16
STATIC, SINGLE = 1.6, 3.0  # times as fast as these the running batch should be
COPIES, ELSEWHERE = 2.0, 0.95  # the same of text with drafts
CIRCLE = list(range(100, 250))  # tokens that follow each other in the text that copies
LAYERS_SPEAK = 2.0**-7  # what is left there of what layers add
ALL_AT_ONCE = 150.0  # tokens per second, roughly, by which arrivals are spread


@dataclass(frozen=True)
class Asked:
    """A request: its prompt, how many new tokens, and when it comes, in seconds from the first on."""

    prompt: list[int]
    count: int
    arrival: float


def requests_of(vocab: int, seed: int = 0) -> list[Asked]:
    """Sixteen of random lengths."""
    random = np.random.default_rng(seed)
    lengths, counts = random.integers(20, 601, REQUESTS), random.integers(10, 201, REQUESTS)
    arrivals = np.sort(random.uniform(0, counts.sum() / 2 / ALL_AT_ONCE, REQUESTS))
    return [
        Asked([int(token) for token in random.integers(3, vocab, length)], int(count), float(when))
        for length, count, when in zip(lengths, counts, arrivals - arrivals[0], strict=True)
    ]


def running(model: TextGenerator, asked: Sequence[Asked]) -> tuple[float, list[list[int]]]:
    """All of them in a running batch; seconds, and what each said."""
    batch, waiting = model.batch(slots=SLOTS), list(asked)
    submitted: list[Request] = []
    started = time.perf_counter()
    while waiting or not all(request.finished for request in submitted):
        while waiting and waiting[0].arrival <= time.perf_counter() - started:
            one = waiting.pop(0)
            submitted.append(batch.submit(one.prompt, max_new_tokens=one.count, greedy=True, ignore_eos=True))
        if not batch.step() and waiting:
            time.sleep(max(0.0, waiting[0].arrival - (time.perf_counter() - started)))
    return time.perf_counter() - started, [request.row.token_ids for request in submitted]


def in_batches(model: TextGenerator, asked: Sequence[Asked], size: int) -> tuple[float, list[list[int]]]:
    """So many at a time, from start to end: each batch runs as long as its longest row."""
    said: list[list[int]] = []
    started = time.perf_counter()
    for first in range(0, len(asked), size):
        part = asked[first : first + size]
        time.sleep(max(0.0, part[-1].arrival - (time.perf_counter() - started)))
        longest = max(one.count for one in part)
        result = model.generate([one.prompt for one in part], max_new_tokens=longest, greedy=True, ignore_eos=True)
        said += [row.token_ids[: one.count] for row, one in zip(result.sequences, part, strict=True)]
    return time.perf_counter() - started, said


def compare_requests(model: TextGenerator, rounds: int) -> dict[str, Any]:
    """The three ways, interleaved; tokens per second and ratios."""
    asked = requests_of(model.bundle.vocab_size)
    tokens = sum(one.count for one in asked)
    ways: dict[str, Callable[[], tuple[float, list[list[int]]]]] = {
        "running": lambda: running(model, asked),
        "static": lambda: in_batches(model, asked, SLOTS),
        "single": lambda: in_batches(model, asked, 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[list[int]]] = {}
    for number in range(rounds):
        for name, run in ways.items():
            took, answers[name] = run()
            seconds[name].append(took)
            print(f"round {number + 1}: {name:8} {tokens / took:6.1f} tokens/s", flush=True)
    ratios = {
        name: round(
            statistics.median(other / own for other, own in zip(seconds[name], seconds["running"], strict=True)), 3
        )
        for name in ("static", "single")
    }
    return {
        "tokens": tokens,
        "tokens_per_s": {name: round(tokens / statistics.median(every), 2) for name, every in seconds.items()},
        "times_as_fast_as": ratios,
        "limits": {"static": STATIC, "single": SINGLE},
        "same_as_alone": sum(one == other for one, other in zip(answers["running"], answers["single"], strict=True)),
        "seconds": {name: [round(one, 3) for one in every] for name, every in seconds.items()},
    }


def make_copying(checkpoint: Path, output: Path) -> None:
    """A checkpoint of the same shape whose greedy text goes round: after token CIRCLE[n] comes CIRCLE[n + 1]."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, output, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.mul_(LAYERS_SPEAK)
    tensors["lm_head.weight"][CIRCLE[1:] + CIRCLE[:1]] = tensors["model.embed_tokens.weight"][CIRCLE]
    save_file(tensors, output / "model.safetensors", {"format": "pt"})


def compare_lookup(model: TextGenerator, copying: TextGenerator, rounds: int) -> dict[str, Any]:
    """Text with drafts against the same without, where it repeats and where it does not."""
    random = np.random.default_rng(1)
    prompt = [int(token) for token in random.integers(3, model.bundle.vocab_size, 64)]
    cases: dict[str, tuple[TextGenerator, list[int], dict[str, Any]]] = {
        "copies": (copying, [*CIRCLE, *CIRCLE[:3]], {"greedy": True}),
        "elsewhere": (model, prompt, {"temperature": 1.0, "top_k": 0, "seed": 5}),
    }
    report: dict[str, Any] = {}
    for name, (speaker, ids, options) in cases.items():
        rates: dict[bool, list[float]] = {False: [], True: []}
        texts: dict[bool, list[int]] = {}
        for _ in range(rounds):
            for lookup in (False, True):
                result = speaker.generate([ids], max_new_tokens=200, ignore_eos=True, prompt_lookup=lookup, **options)
                assert result.timing.decode_tokens_per_s is not None
                rates[lookup].append(result.timing.decode_tokens_per_s)
                texts[lookup] = result.sequences[0].token_ids
        ratio = statistics.median(drafting / plain for drafting, plain in zip(rates[True], rates[False], strict=True))
        report[name] = {
            "tokens_per_s": {"plain": statistics.median(rates[False]), "lookup": statistics.median(rates[True])},
            "times_as_fast": round(ratio, 3),
            "limit": COPIES if name == "copies" else ELSEWHERE,
            "same_tokens": texts[False] == texts[True],
            "different_tokens_in_the_text": len(set(texts[False])),
        }
        print(f"lookup {name}: {json.dumps(report[name])}", flush=True)
    return report


def measure(precision: str, checkpoint: Path, copying: Path, rounds: int) -> dict[str, Any]:
    """Both parts, of bundles that are made where they are not there."""
    model, copies = _exported(checkpoint, precision), _exported(copying, precision)
    return {
        "runs_on": f"{model.backend}, {model.device}",
        "requests": compare_requests(model, rounds),
        "lookup": compare_lookup(model, copies, rounds),
    }


def _exported(checkpoint: Path, precision: str) -> TextGenerator:
    bundle = checkpoint.with_name(f"{checkpoint.name}-{precision}")
    if not bundle.exists():
        measured([*OURS, "export", checkpoint, bundle, "--precision", precision, "--no-verify"])
    return load(bundle, task="text-generation")


def passed(report: dict[str, Any]) -> bool:
    """Whether every figure is within its limit."""
    requests, lookup = report["requests"], report["lookup"]
    fast = all(requests["times_as_fast_as"][name] >= limit for name, limit in requests["limits"].items())
    return fast and all(case["times_as_fast"] >= case["limit"] and case["same_tokens"] for case in lookup.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; exit code 1 where a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where checkpoint and bundle stay; a temporary one by default")
    parser.add_argument("--precision", nargs="+", default=["int4", "fp32"], metavar="P", help="of export")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = given.directory or Path(temporary)
        checkpoint, copying = scratch / PRESET, scratch / f"{PRESET}-copying"
        if not checkpoint.exists():
            measured([sys.executable, "-m", "benchmarks.make_checkpoint", "--preset", PRESET, checkpoint])
        if not copying.exists():
            make_copying(checkpoint, copying)
        models = {name: measure(name, checkpoint, copying, given.rounds) for name in given.precision}
    report = {"schema": 1, "preset": PRESET, "rounds": given.rounds, "precisions": models}
    given.results.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, found in models.items():
        print(f"{name}: {json.dumps(found['requests']['times_as_fast_as'])}", "passed" if passed(found) else "MISSED")
    return 0 if all(map(passed, models.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
