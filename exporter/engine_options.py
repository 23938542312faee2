"""What an engine is built for: GPUs, shapes and flags, each checked before anything is parsed."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugins.tensorrt_network import LOWER_RIGHT
from runtime.cuda import Cuda
from runtime.errors import UserError
from runtime.tensorrt_api import FLAVORS

MAX_KEPT = 16  # logits of more positions at once take memory that generation never needs
HARDWARE_COMPATIBILITY = ("ampere-plus", "same-compute-capability")
PROFILING_VERBOSITY = ("layer-names", "detailed", "none")
NATIVE, PLUGIN = "native", "plugin"
ATTENTIONS = (NATIVE, PLUGIN)
# As NVIDIA documents it, and as TensorRT-RTX refuses the others ("HW-specific datatypes").
_OLDEST_CAPABILITY = {"fp16": (0, 0), "bf16": (8, 0), "int4": (8, 0), "fp8": (8, 9)}


@dataclass(frozen=True)
class BuildOptions:
    """What to build; defaults as on the command line.

    Attributes:
        flavor: one of `runtime.tensorrt_api.FLAVORS`.
        capabilities: compute capabilities to build for, as "8.9" (default: that of the GPU here).
        max_batch_size: the most rows of a step.
        max_input_len: the most tokens of a row in one step (default: 1024, or the capacity where that is less).
        max_seq_len: the cache's capacity (default: 4096, or the bundle's maximum where that is less).
        attention: one of ATTENTIONS: TensorRT's own layers, or kernels whose cost follows the length; flavor tensorrt.
        causality: one of `plugins.tensorrt_network.CAUSALITIES`; of native attention.
        optimization_level: 0 to 5, TensorRT's own by default.
        hardware_compatibility: one of HARDWARE_COMPATIBILITY; flavor tensorrt.
        version_compatible: let later versions load the engine; flavor tensorrt.
        weight_streaming: let weights stay in host memory when the engine runs.
        strip: leave the weights out of the engine; needs a GPU here, and the bundle's own weights when it is loaded.
        profiling_verbosity: one of PROFILING_VERBOSITY: what profilers see of the layers.
        timing_cache: a file that remembers measured kernels from build to build; flavor tensorrt.
        force: replace an engine that exists.
    """

    flavor: str
    capabilities: tuple[str, ...] = ()
    max_batch_size: int = 1
    max_input_len: int | None = None
    max_seq_len: int | None = None
    attention: str = NATIVE
    causality: str = LOWER_RIGHT
    optimization_level: int | None = None
    hardware_compatibility: str | None = None
    version_compatible: bool = False
    weight_streaming: bool = False
    strip: bool = False
    profiling_verbosity: str | None = None
    timing_cache: Path | None = None
    force: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """What the engine's record says of how it was built beyond its shapes."""
        named = {
            "version-compatible": self.version_compatible,
            "weight-streaming": self.weight_streaming,
            "strip": self.strip,
            f"hardware-compatible {self.hardware_compatibility}": bool(self.hardware_compatibility),
        }
        return tuple(name for name, given in named.items() if given)


@dataclass(frozen=True)
class Shapes:
    """The most rows, tokens of a row, cache positions, and positions with logits, of a step."""

    batch: int
    input_len: int
    capacity: int
    kept: int


def check_options(options: BuildOptions) -> None:
    """Refuse what a flavor does not have.

    Raises:
        UserError: an unknown flavor, or an option that means nothing to it.
    """
    if options.flavor not in FLAVORS:
        raise UserError(f"unknown flavor {options.flavor!r}; known: {', '.join(FLAVORS)}")
    if options.timing_cache and not options.timing_cache.absolute().parent.is_dir():
        raise UserError(f"--timing-cache {options.timing_cache}: its directory does not exist; make it first")
    if options.attention not in ATTENTIONS:
        raise UserError(f"unknown attention {options.attention!r}; known: {', '.join(ATTENTIONS)}")
    if options.attention == PLUGIN:
        _check_plugin(options)
    if options.flavor == "tensorrt":
        return
    refused = {
        "--hardware-compatibility": (options.hardware_compatibility, "give --compute-capability more than once"),
        "--version-compatible": (options.version_compatible, "build again with each version"),
        "--timing-cache": (options.timing_cache, "it times kernels where the engine runs, so drop it"),
    }
    for flag, (given, remedy) in refused.items():
        if given:
            raise UserError(f"{flag} means nothing to flavor {options.flavor}; {remedy}")
    if options.strip and local_capability() is None:
        raise UserError("--strip needs an NVIDIA GPU while building, and none is found here; drop it or build there")


def _check_plugin(options: BuildOptions) -> None:
    """Refuse what an engine with the kernels cannot be."""
    if options.flavor != "tensorrt":
        raise UserError(
            f"flavor {options.flavor} takes no plugins that are compiled ahead of time, as those of --attention plugin "
            "are; build with --attention native"
        )
    refused = {
        "--hardware-compatibility": options.hardware_compatibility,
        "--version-compatible": options.version_compatible,
        "--strip": options.strip,
        "--causality mask": options.causality != LOWER_RIGHT,
    }
    reasons = {
        "--strip": "are not in the graph that a stripped engine is filled from",
        "--causality mask": "are causal by themselves",
    }
    for flag, given in refused.items():
        if given:
            reason = reasons.get(flag, "are compiled for the GPU and the TensorRT here")
            raise UserError(f"{flag} is not for --attention plugin, whose kernels {reason}; drop one of the two")


def resolve_shapes(options: BuildOptions, max_length: int, needed: int = 1) -> Shapes:
    """The step's largest shapes, with defaults filled in.

    Args:
        options: what was asked for.
        max_length: tokens a row of the bundle can have.
        needed: the capacity that the golden cases take; an engine with less could never prove itself.

    Raises:
        UserError: a length beyond the bundle's maximum or the capacity, or a number below 1.
    """
    capacity = min(4096, max_length) if options.max_seq_len is None else options.max_seq_len
    if not 1 <= capacity <= max_length:
        raise UserError(f"--max-seq-len should be within 1..{max_length}, the bundle's max_length; found {capacity}")
    if capacity < needed:
        raise UserError(f"--max-seq-len should be at least {needed}, which the golden cases take; found {capacity}")
    input_len = min(1024, capacity) if options.max_input_len is None else options.max_input_len
    if not 1 <= input_len <= capacity:
        raise UserError(f"--max-input-len should be within 1..{capacity}, the --max-seq-len; found {input_len}")
    if options.max_batch_size < 1:
        raise UserError(f"--max-batch-size should be at least 1, found {options.max_batch_size}; give a larger one")
    return Shapes(options.max_batch_size, input_len, capacity, min(MAX_KEPT, input_len))


def resolve_capabilities(trt: Any, options: BuildOptions, precisions: Collection[str]) -> tuple[str, ...]:
    """The compute capabilities to build for, each known to the builder and able to compute in every precision.

    Args:
        trt: the flavor's module.
        options: what was asked for.
        precisions: of the graph's activations and weights.

    Raises:
        UserError: a capability is misspelled, unknown, not the local GPU's where it must be, or lacks a precision.
    """
    given = tuple(dict.fromkeys(options.capabilities))
    for capability in given:
        if not re.fullmatch(r"\d{1,2}\.\d", capability):
            raise UserError(f"compute capability {capability!r} is not a number like 8.9; see your GPU's")
    found: tuple[str, ...]
    if options.flavor == "tensorrt":
        found = (_local_for_tensorrt(given),)
    else:
        found = given or (_local_for_rtx(),)
        members = trt.ComputeCapability.__members__
        known = [f"{name[2:-1]}.{name[-1]}" for name in members if name.startswith("SM")]
        for capability in found:
            if capability not in known:
                raise UserError(
                    f"{options.flavor} {trt.__version__} does not build for compute capability {capability}; "
                    f"known: {', '.join(known)}"
                )
    for capability in found:
        _check_precisions(capability, precisions)
    return found


def _check_precisions(capability: str, precisions: Collection[str]) -> None:
    own = tuple(map(int, capability.split(".")))
    has = [name for name, oldest in _OLDEST_CAPABILITY.items() if own >= oldest]
    for name, (major, minor) in _OLDEST_CAPABILITY.items():
        if name in precisions and name not in has:
            raise UserError(
                f"compute capability {capability} lacks {name}, which begins with {major}.{minor}; "
                f"export without it, with --precision {' or '.join(has)}"
            )


def local_capability() -> str | None:
    """The compute capability of the first GPU here, as "8.9"; None without one."""
    gpu = Cuda().gpu()
    return gpu.capability if gpu else None


def _local_for_tensorrt(given: tuple[str, ...]) -> str:
    local = local_capability()
    if local is None:
        raise UserError(
            "flavor tensorrt builds on the GPU that will run the engine, and no NVIDIA GPU is found here; "
            "build there, or use --flavor tensorrt-rtx --compute-capability 8.9"
        )
    if given not in ((), (local,)):
        raise UserError(
            f"flavor tensorrt builds for the GPU here, which is {local}, not for {', '.join(given)}; "
            "drop --compute-capability, or use --flavor tensorrt-rtx"
        )
    return local


def _local_for_rtx() -> str:
    local = local_capability()
    if local is None:
        raise UserError("no NVIDIA GPU is found here; name the one to build for, such as --compute-capability 8.9")
    return local
