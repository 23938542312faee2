"""What exporting a checkpoint would take, and what its bundles would: told before anything is exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from exporter.checkpoint import Checkpoint
from exporter.cost import (
    Model,
    bundle_bytes,
    cache_bytes_per_token,
    data_bytes,
    export_peak_bytes,
    fitting_tokens,
    layered_gate_bytes,
    model_of,
    scratch_bytes,
    whole_gate_bytes,
)
from exporter.parameters import EMBEDDING, is_matrix, shapes_in
from exporter.plan import ExportOptions, Plan, make_plan
from exporter.preflight import free_disk
from exporter.recipe import FLOATS, FORMS, read_recipe
from exporter.sentencepiece_conversion import find_model
from exporter.spec import read_config
from exporter.tasks import GENERATION
from exporter.throughput import Throughput, measure_throughput
from runtime.errors import UserError
from runtime.manifest import CHAT_TEMPLATE, CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG

_COMPANIONS = (CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE)
_CONVERTED = 3  # tokenizer.json, times the sentencepiece model that it is made of
STARTED = 12.0  # seconds of imports, trace and passes, whatever the checkpoint
# What the gate runs: tokens through transformers in fp32 and, as slow again, its yardstick; steps through the bundle.
_GATE_TOKENS, _GATE_STEPS = 160, 35


@dataclass(frozen=True)
class Fit:
    """What fits into memory beside the weights where the bundle runs.

    Attributes:
        length, batch: rows of this length, and how many of them fit.
        rows, longest: this many rows, and how long they can be, at most the model's length.
    """

    length: int
    batch: int
    rows: int
    longest: int


@dataclass(frozen=True)
class Estimate:
    """What one precision takes, in bytes and seconds; of one that is refused, why.

    Attributes:
        peak, peak_layered, peak_whole: of the export's memory without the gate and with it in either mode.
        disk: of the destination's file system at the highest.
        fit: None where the graph has no cache.
    """

    precision: str
    refused: str | None = None
    bundle: int = 0
    disk: int = 0
    peak: int = 0
    peak_layered: int = 0
    peak_whole: int = 0
    cache_per_token: int = 0
    fit: Fit | None = None
    seconds: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """An object of `precisions` of the command `plan`."""
        if self.refused is not None:
            return {"precision": self.precision, "refused": self.refused}
        return {
            "precision": self.precision,
            "bundle_bytes": self.bundle,
            "disk_bytes": self.disk,
            "peak_bytes": {"unchecked": self.peak, "layer by layer": self.peak_layered, "whole": self.peak_whole},
            "kv_bytes_per_token": self.cache_per_token or None,
            "fits": vars(self.fit) if self.fit else None,
            "seconds": {stage: round(seconds, 3) for stage, seconds in (self.seconds or {}).items()},
        }


@dataclass(frozen=True)
class Forecast:
    """The whole of it: sizes in bytes; `place` is the directory whose disk was measured, `max_length` in tokens."""

    checkpoint: str
    task: str
    target: str
    max_length: int
    parameters: int
    checkpoint_bytes: int
    memory: int
    place: Path
    free: int
    measured: Throughput
    precisions: tuple[Estimate, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON object of the command `plan`."""
        return {
            "schema": 1,
            "checkpoint": self.checkpoint,
            "task": self.task,
            "target": self.target,
            "max_length": self.max_length,
            "parameters": self.parameters,
            "checkpoint_bytes": self.checkpoint_bytes,
            "memory_bytes": self.memory,
            "disk": {"path": str(self.place), "free_bytes": self.free},
            "measured": self.measured.to_json(),
            "precisions": [estimate.to_json() for estimate in self.precisions],
        }


def forecast(
    checkpoint: Checkpoint,
    destination: Path,
    options: ExportOptions,
    precisions: Sequence[str],
    memory: int,
    *,
    batch: int | None = None,
    length: int | None = None,
) -> Forecast:
    """Tell what exporting would take.

    Args:
        checkpoint: what would be exported.
        destination: where to.
        options: how; their precision is not looked at.
        precisions: those to tell of; none are all of the target. Of those that were not named, one that cannot be
            exported is told with its reason.
        memory: bytes that export and runtime may use.
        batch, length: rows, and tokens of a row, that the runtime shall hold (default: 1, and the model's length).

    Raises:
        UserError: a value is unknown, a named precision cannot be exported, or the disk cannot be measured.
    """
    read_recipe(options.recipe)
    plans = _plans(checkpoint, options, precisions)
    good = [plan for plan in plans.values() if isinstance(plan, Plan)]
    model = _model(checkpoint, good[0])
    files = {info.file: info.file.stat().st_size for info in checkpoint.tensors.values()}
    place, free = free_disk(destination)
    measured = measure_throughput(place, max(files, key=files.__getitem__), [plan.precision for plan in good])
    told = _Teller(model, options, memory, measured, sum(files.values()), _companions(checkpoint.path))
    return Forecast(
        checkpoint=str(checkpoint.path),
        task=good[0].task.name,
        target=options.target,
        max_length=good[0].max_length,
        parameters=model.parameters,
        checkpoint_bytes=told.stored,
        memory=memory,
        place=place,
        free=free,
        measured=measured,
        precisions=tuple(
            Estimate(name, refused=str(plan))
            if isinstance(plan, UserError)
            else told.estimate(plan, batch or 1, length)
            for name, plan in plans.items()
        ),
    )


def _plans(checkpoint: Checkpoint, options: ExportOptions, precisions: Sequence[str]) -> dict[str, Plan | UserError]:
    """By precision, the plan of an export or why there is none."""
    plans: dict[str, Plan | UserError] = {}
    for name in precisions or FORMS[options.target]:
        plain = not precisions and name in FLOATS
        asked = replace(options, precision=name, recipe=None if plain else options.recipe)
        try:
            plan = make_plan(asked, checkpoint)
            model = _model(checkpoint, plan)
            plan.precision.check_layers(filter(is_matrix, model.shapes))
            data_bytes(model, plan.precision)  # refuses what the target cannot round
            plans[name] = plan
        except UserError as error:
            if precisions or name == "fp32":  # what is wrong with fp32 is wrong with all
                raise
            plans[name] = error
    return plans


@dataclass(frozen=True)
class _Teller:
    """What the estimates of all precisions have in common: `stored` and `companions` are bytes of the checkpoint's."""

    model: Model
    options: ExportOptions
    memory: int
    rates: Throughput
    stored: int
    companions: int

    def estimate(self, plan: Plan, rows: int, length: int | None) -> Estimate:
        """Of one precision."""
        model, precision, tokens = self.model, plan.precision, self.options.calibration_tokens
        size = bundle_bytes(model, precision, self.companions)
        gates = (0, layered_gate_bytes(model), whole_gate_bytes(model.parameters))
        unchecked, layered, whole = (export_peak_bytes(model, precision, tokens, gate) for gate in gates)
        cached = plan.form.cache
        return Estimate(
            precision=precision.name,
            bundle=size,
            disk=size + scratch_bytes(model, precision),
            peak=unchecked,
            peak_layered=layered,
            peak_whole=whole,
            cache_per_token=cache_bytes_per_token(model, precision) if cached else 0,
            fit=self._fit(plan, rows, length) if cached else None,
            seconds=self._seconds(plan, size),
        )

    def _fit(self, plan: Plan, rows: int, length: int | None) -> Fit:
        tokens = fitting_tokens(self.model, plan.precision, self.memory)
        length = min(length or plan.max_length, plan.max_length)
        return Fit(length=length, batch=tokens // length, rows=rows, longest=min(plan.max_length, tokens // rows))

    def _seconds(self, plan: Plan, size: int) -> dict[str, float]:
        """By stage; of calibration, gate and quality, what their products take."""
        precision, rates, count = plan.precision, self.rates, self.model.parameters
        embedding = 0 if self.model.tied else prod(self.model.shapes[EMBEDDING])  # a table, unless it is the head too
        token = 2 * (count - embedding) / rates.products
        converted = count / rates.converted[precision.name]
        taken = self.stored / rates.read + self.stored / rates.digest  # what every reading of the checkpoint takes
        seconds = {"start": STARTED}
        if precision.calibrated:
            passes = 1 + 5 * precision.scaling + 3 * precision.gptq  # the search for factors, the rounded stream
            seconds["calibration"] = (
                taken + passes * self.options.calibration_tokens * 2 * self.model.layers / rates.products
            )
        seconds["weights"] = taken + converted + size / rates.write + size / rates.digest
        if self.options.verify:
            products, steps = 3 * _GATE_TOKENS * token, _GATE_STEPS * 4 * (count - embedding) / rates.streaming
            seconds["verify"] = 2 * (taken + converted) + products + steps + size / rates.digest
            if not precision.exact and plan.task.name == GENERATION:
                seconds["quality"] = taken + 2 * self.options.eval_tokens * token
        return seconds


def _model(checkpoint: Checkpoint, plan: Plan) -> Model:
    model = model_of(shapes_in(checkpoint.tensors), plan.task.name, read_config(checkpoint.path))
    return replace(model, table=plan.max_length * checkpoint.spec.rotary_dim // 2, embeds=plan.form.embeds)


def _companions(directory: Path) -> int:
    """Bytes of what goes along with the graph."""
    sizes = [(directory / name).stat().st_size for name in _COMPANIONS if (directory / name).is_file()]
    model = None if (directory / TOKENIZER).is_file() else find_model(directory)
    return sum(sizes) + (_CONVERTED * model.stat().st_size if model else 0)
