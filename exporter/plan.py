"""What an export was asked for, with the checkpoint's defaults filled in and every value checked, before any work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from exporter.calibrate import Sample
from exporter.checkpoint import Checkpoint
from exporter.evaluation_text import default_text, read_tokens, windows
from exporter.lowering import TARGETS
from exporter.recipe import Precision, precision_of, read_recipe
from exporter.rope import checked_length
from exporter.tasks import ARCHITECTURES, GENERATION, TASKS, GraphForm, Task, check_form
from runtime.errors import UserError
from runtime.ort_session import import_onnxruntime
from runtime.session import Ints

INPUTS = ("ids", "embeds")
WEIGHTS = ("copy", "link")
_STORED = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
WINDOW = 256  # tokens of a row by which quality is measured


@dataclass(frozen=True)
class ExportOptions:
    """What to export; defaults as on the command line.

    Attributes:
        task: by default the one that the checkpoint's architecture implies.
        target: one of `exporter.lowering.TARGETS`.
        precision: one that the target has.
        max_length: tokens that a row may hold (default: `max_position_embeddings`; most: `exporter.rope.longest`).
        cache: whether keys and values go in and out (default: for text generation); else every run is of whole rows.
        inputs: `ids`, or `embeds` for embeddings in place of token ids.
        position_ids: the tokens' positions are an input.
        output_hidden_states, output_attentions: what each layer gives is handed out.
        recipe: how matrices are rounded below 16 bit: a preset's name, or a TOML file.
        kv_cache: `int8` for a cache that is rounded to it (default: the activations' dtype).
        calibration: the text that scales, codes and ranges are chosen by (default: `calibration.txt` of the checkpoint,
            else of the checkpoint that comes with the package).
        calibration_tokens: how many of its tokens.
        calibration_seed: chooses which.
        fp16_safe: keep layers in fp16's range, where activations are in fp16.
        eval_text: what the cost of weights, activations or a cache below fp32 is measured on (default: `heldout.txt`
            of the checkpoint, else of the checkpoint that comes with the package).
        eval_tokens: how many of its tokens.
        max_kl: the largest mean KL divergence from fp32 that passes, in nats.
        max_perplexity_increase: the largest rise of perplexity over fp32 that passes, in percent.
        verify: run the parity gate; without it the bundle has no golden cases, and no quality is measured.
        memory: bytes that the export may use in all (default: what the machine has available); the parity gate runs
            layer by layer where the whole model does not fit them.
        force: replace a bundle that exists.
        weights: `copy`, or `link` for the checkpoint's own files in the bundle, where they hold what the graph reads.
        adapter: a directory with a LoRA adapter to merge into the checkpoint.
        revision: branch, tag or commit, where the checkpoint is a hub id.
    """

    task: str | None = None
    target: str = "onnxruntime"
    precision: str = "fp32"
    max_length: int | None = None
    cache: bool | None = None
    inputs: str = "ids"
    position_ids: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    recipe: str | None = None
    kv_cache: str | None = None
    calibration: Path | None = None
    calibration_tokens: int = 16384
    calibration_seed: int = 0
    fp16_safe: bool = True
    eval_text: Path | None = None
    eval_tokens: int = 4096
    max_kl: float | None = None
    max_perplexity_increase: float | None = None
    verify: bool = True
    memory: int | None = None
    force: bool = False
    weights: str = "copy"
    adapter: Path | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Plan:
    """Options with the checkpoint's defaults filled in and every value checked."""

    task: Task
    form: GraphForm
    max_length: int
    target: str
    precision: Precision
    link: bool


@dataclass(frozen=True)
class Windows:
    """A text's name, and tokens of it, int64 [n, length]."""

    text: str
    tokens: Ints


def make_plan(options: ExportOptions, checkpoint: Checkpoint) -> Plan:
    """Fill in and check everything that headers and configuration can tell.

    Raises:
        UserError: an unknown value, or one that this checkpoint, task or target does not carry.
    """
    own = ARCHITECTURES[checkpoint.spec.architecture].name
    task = options.task or own
    choices = (
        ("task", task, TASKS),
        ("target", options.target, TARGETS),
        ("inputs", options.inputs, INPUTS),
        ("weights", options.weights, WEIGHTS),
    )
    for what, value, known in choices:
        if value not in known:
            raise UserError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    precision = precision_of(options.target, options.precision, read_recipe(options.recipe))
    precision = replace(precision, fp16_safe=options.fp16_safe, kv_cache=options.kv_cache)
    if options.cache and task != GENERATION:
        raise UserError(f"a cache is of {GENERATION}; export for {task} without one")
    form = GraphForm(
        cache=task == GENERATION if options.cache is None else options.cache,
        embeds=options.inputs == "embeds",
        position_ids=options.position_ids,
        hidden_states=options.output_hidden_states,
        attentions=options.output_attentions,
    )
    check_form(form, task, options.target)
    _check_kv_cache(options, form)
    link = options.weights == "link"
    if link:
        _check_linked(checkpoint, precision)
    if precision.quantized and not form.cache:
        raise UserError(
            f"--precision {precision.name} is of {GENERATION} with a cache; export this graph with fp32, fp16 or bf16"
        )
    if options.target == "onnxruntime" and options.verify and (precision.quantized or precision.name == "fp32"):
        import_onnxruntime()  # the gate runs the graph, or measures on it: better to know now
    length = checked_length(checkpoint.spec, options.max_length)
    return Plan(TASKS[task], form, length, options.target, precision, link)


def _check_kv_cache(options: ExportOptions, form: GraphForm) -> None:
    if options.kv_cache is None:
        return
    if options.kv_cache not in (known := sorted({name for target in TARGETS.values() for name in target.kv_caches})):
        raise UserError(f"unknown cache {options.kv_cache!r}; known: {', '.join(known)}")
    asked = f"--kv-cache {options.kv_cache}"
    if not form.cache:
        raise UserError(f"{asked} is of {GENERATION} with a cache, this graph has none; leave it out")
    if options.kv_cache not in TARGETS[options.target].kv_caches:
        raise UserError(
            f"target {options.target} has no {asked}: TensorRT's cache update refuses caches of 8 bits; leave it out, "
            "or export with --target onnxruntime"
        )
    if form.position_ids or form.hidden_states:
        raise UserError(
            f"{asked} goes with neither --position-ids nor --output-hidden-states, which are compared without a cache; "
            "leave one out"
        )


def _check_linked(checkpoint: Checkpoint, precision: Precision) -> None:
    if not checkpoint.safetensors:
        raise UserError(
            f"--weights link: {checkpoint.path} has pickles, whose tensors a graph cannot refer to; "
            "convert it to safetensors, or leave it out"
        )
    matrices = [
        info for name, info in checkpoint.tensors.items() if len(info.shape) > 1 and name not in checkpoint.adapted
    ]
    stored = sorted({_STORED[info.dtype] for info in matrices})
    if precision.quantized or precision.activations not in stored:
        linked = f"export with --precision {' or '.join(stored)}, or" if stored else "export"
        raise UserError(
            f"--weights link: at --precision {precision.name} no matrix is as {checkpoint.path} has it; "
            f"{linked} with --weights copy"
        )


def windows_of(options: ExportOptions, plan: Plan, checkpoint: Checkpoint) -> Windows | None:
    """What the cost of the precision is measured on; None where there is none to measure.

    Raises:
        UserError: the text cannot be read or is shorter than one window, or there are limits and nothing to measure.
    """
    limited = options.max_kl is not None or options.max_perplexity_increase is not None
    if plan.precision.exact or plan.task.name != GENERATION or not options.verify:
        if limited:
            raise UserError(
                "--max-kl and --max-perplexity-increase are of text generation below fp32, checked (--verify); "
                "leave them out"
            )
        return None
    path = options.eval_text or default_text("heldout.txt", checkpoint.path)
    tokens = read_tokens(path, checkpoint.path)
    return Windows(path.name, windows(tokens, min(WINDOW, plan.max_length), options.eval_tokens, path))


def sample_of(options: ExportOptions, plan: Plan, checkpoint: Checkpoint) -> Sample | None:
    """What scales, codes and ranges are chosen by; None where nothing is.

    Raises:
        UserError: the text cannot be read or is shorter than one window, or one is given and nothing to choose.
    """
    if not plan.precision.calibrated:
        if options.calibration is not None:
            raise UserError(
                f"--calibration: --precision {plan.precision.name} with recipe {plan.precision.recipe.name} chooses "
                "nothing by a text; leave it out, or take --recipe aware or --kv-cache int8"
            )
        return None
    path = options.calibration or default_text("calibration.txt", checkpoint.path)
    tokens = read_tokens(path, checkpoint.path)
    length = max(2, min(WINDOW, plan.max_length))
    everything = windows(tokens, length, max(len(tokens), length), path)
    if options.calibration_tokens < length:
        raise UserError(
            f"--calibration-tokens should be at least {length}, one window; found {options.calibration_tokens}"
        )
    order = np.random.default_rng(options.calibration_seed).permutation(len(everything))
    chosen = order[: options.calibration_tokens // length]
    return Sample(path.name, everything[np.sort(chosen)], options.calibration_seed)
