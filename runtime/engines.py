"""Which of a bundle's engines runs here, what to do where none does, and how one is loaded."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

from runtime.bundle import Bundle
from runtime.contract import INPUTS_EMBEDS, POSITION_IDS
from runtime.cuda import Cuda, Gpu
from runtime.errors import UserError
from runtime.manifest import MODEL, Engine
from runtime.tensorrt_api import FLAVORS, Messages, import_tensorrt

# As the engine's record names them (exporter.engine_options).
VERSION_COMPATIBLE, STRIPPED, WEIGHT_STREAMING = "version-compatible", "strip", "weight-streaming"


@dataclass(frozen=True)
class Chosen:
    """An engine that fits this machine, with the libraries that run it."""

    engine: Engine
    trt: Any
    cuda: Cuda
    gpu: Gpu


def choose_engine(bundle: Bundle, flavor: str | None = None) -> Chosen:
    """The engine of the bundle that runs on this machine's GPU.

    Args:
        bundle: of target `tensorrt`.
        flavor: one of FLAVORS; None takes either.

    Raises:
        UserError: there is none; says of each engine why it does not fit, and how to build one that does.
    """
    if bundle.manifest.target != "tensorrt":
        raise UserError(f"{bundle.path} is for {bundle.manifest.target}; export it with --target tensorrt")
    if added := sorted(bundle.input_names & {INPUTS_EMBEDS, POSITION_IDS}):
        raise UserError(f"{bundle.path} takes {', '.join(added)}, which engines are not fed; use --backend onnxruntime")
    wanted = [flavor] if flavor else list(FLAVORS)
    engines = [engine for name in wanted for engine in bundle.manifest.engines if engine.flavor == name]
    remedy = f"nemotron-export build {bundle.path} --flavor {flavor or 'tensorrt'}"
    if not engines:
        raise UserError(f"{bundle.path} has no {flavor or 'TensorRT'} engine; run {remedy}")
    cuda = Cuda()
    gpu = cuda.gpu()
    if gpu is None:
        raise UserError(
            f"{bundle.path} has an engine, but no NVIDIA GPU is visible here; use --backend onnxruntime, "
            "or check nvidia-smi"
        )
    reasons = []
    for engine in engines:
        try:
            return Chosen(engine, _fitting(bundle, engine, gpu), cuda, gpu)
        except UserError as error:
            reasons.append(str(error))
    raise UserError("; ".join(dict.fromkeys(reasons)))


def _fitting(bundle: Bundle, engine: Engine, gpu: Gpu) -> Any:
    """The module that runs the engine.

    Raises:
        UserError: the engine is of another graph, GPU or version, or its flavor is not installed.
    """
    rebuild = engine.rebuild(bundle.path)
    graph = bundle.manifest.files.get(MODEL)
    if graph is None or engine.graph_sha256 != graph.sha256:
        raise UserError(f"{engine.path} was built from another graph than this bundle's; run {rebuild}")
    if gpu.capability not in engine.capabilities and not _runs_on_newer(engine, gpu):
        built = ", ".join(engine.capabilities)
        raise UserError(
            f"{engine.path} is for compute capability {built}, this GPU ({gpu.name}) has {gpu.capability}; "
            f"run {rebuild.removesuffix(' --force')} here"
        )
    trt = import_tensorrt(engine.flavor)
    if trt.__version__ != engine.version and not _runs_on_later(engine, trt.__version__):
        raise UserError(
            f"{engine.path} was built by {engine.flavor} {engine.version}, installed is {trt.__version__}; "
            f"run {rebuild}"
        )
    return trt


def _runs_on_newer(engine: Engine, gpu: Gpu) -> bool:
    """Built with hardware compatibility: for every GPU since Ampere."""
    return "hardware-compatible ampere-plus" in engine.flags and float(gpu.capability) >= 8.0


def _runs_on_later(engine: Engine, version: str) -> bool:
    """Built with version compatibility: for later versions of the same major one."""

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(".") if part.isdigit()]

    built, here = numbers(engine.version), numbers(version)
    return VERSION_COMPATIBLE in engine.flags and here[:1] == built[:1] and here >= built


def deserialise(bundle: Bundle, chosen: Chosen, runtime: Any, messages: Messages, rebuild: str) -> Any:
    """The engine on the GPU, with its weights. `runtime` is TensorRT's, and must live as long as the engine.

    Raises:
        UserError: TensorRT refuses the plan, or the weights that were left out of it cannot be put back.
    """
    trt, record = chosen.trt, chosen.engine
    if VERSION_COMPATIBLE in record.flags:
        runtime.engine_host_code_allowed = True  # such a plan carries a small runtime of its own
    plan = bundle.file(record.path)
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise UserError(f"{plan} cannot be loaded ({messages.reason()}); {rebuild}")
    if WEIGHT_STREAMING in record.flags:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    if STRIPPED in record.flags:
        refitter = trt.Refitter(engine, runtime.logger)
        parsed = trt.OnnxParserRefitter(refitter, runtime.logger).refit_from_file(str(bundle.file(MODEL)))
        if not parsed or not refitter.refit_cuda_engine():
            raise UserError(
                f"{plan} does not take the weights of {bundle.file(MODEL)} ({messages.reason()}); {rebuild}"
            )
    return engine
