"""Which of a bundle's engines runs here, and what to do where none does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runtime.bundle import Bundle
from runtime.cuda import Cuda, Gpu
from runtime.errors import UserError
from runtime.manifest import MODEL, Engine
from runtime.tensorrt_api import FLAVORS, import_tensorrt


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
    rebuild = f"nemotron-export build {bundle.path} --flavor {engine.flavor} --force"
    graph = bundle.manifest.files.get(MODEL)
    if graph is None or engine.graph_sha256 != graph.sha256:
        raise UserError(f"{engine.path} was built from another graph than this bundle's; run {rebuild}")
    if gpu.capability not in engine.capabilities:
        built = ", ".join(engine.capabilities)
        raise UserError(
            f"{engine.path} is for compute capability {built}, this GPU ({gpu.name}) has {gpu.capability}; "
            f"run {rebuild.removesuffix(' --force')} here"
        )
    trt = import_tensorrt(engine.flavor)
    if trt.__version__ != engine.version:
        raise UserError(
            f"{engine.path} was built by {engine.flavor} {engine.version}, installed is {trt.__version__}; "
            f"run {rebuild}"
        )
    return trt
