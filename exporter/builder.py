"""How TensorRT's builder is set up, and what it tells while it builds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from exporter.engine_options import BuildOptions, Shapes
from runtime.contract import INPUT_IDS, LOGITS_INDICES, WRITE_INDICES
from runtime.errors import UserError

_VERBOSITY = {"layer-names": "LAYER_NAMES_ONLY", "detailed": "DETAILED", "none": "NONE"}


def configure(
    trt: Any, builder: Any, network: Any, options: BuildOptions, shapes: Shapes, capabilities: tuple[str, ...]
) -> Any:
    """The IBuilderConfig: profiles, targets and flags. The workspace limit stays: a small one removes tactics.

    Raises:
        UserError: the timing cache cannot be used.
    """
    config = builder.create_builder_config()
    for profile in _profiles(builder, network, options.flavor, shapes):
        assert config.add_optimization_profile(profile) >= 0
    if options.flavor == "tensorrt-rtx":
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            member = trt.ComputeCapability.__members__[f"SM{capability.replace('.', '')}"]
            config.set_compute_capability(member, index)
    flags = {
        "VERSION_COMPATIBLE": options.version_compatible,
        "WEIGHT_STREAMING": options.weight_streaming,
        "STRIP_PLAN": options.strip,
        # Not REFIT: TensorRT's release notes own that it may drop a bias, without an error.
        "REFIT_IDENTICAL": options.strip,
    }
    for name in (name for name, wanted in flags.items() if wanted):
        config.set_flag(trt.BuilderFlag.__members__[name])
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; it rounds what an fp32 graph multiplies to 10 bits
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.hardware_compatibility:
        name = options.hardware_compatibility.upper().replace("-", "_")
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.__members__[name]
    if options.profiling_verbosity:
        config.profiling_verbosity = trt.ProfilingVerbosity.__members__[_VERBOSITY[options.profiling_verbosity]]
    if options.timing_cache:
        known = options.timing_cache.read_bytes() if options.timing_cache.exists() else b""
        if not config.set_timing_cache(config.create_timing_cache(known), False):
            raise UserError(f"{options.timing_cache} is of another version or GPU; remove it, or give another file")
    return config


def _profiles(builder: Any, network: Any, flavor: str, shapes: Shapes) -> list[Any]:
    """TensorRT: prefill and decode. TensorRT-RTX: one, whose best shape is a decode step; a second doubles the plan."""
    prefill, decode = (shapes.input_len, shapes.kept), (1, 1)
    ranges = [(decode, decode, prefill)]
    if flavor == "tensorrt":
        ranges = [(decode, prefill, prefill), (decode, decode, decode)]
    profiles = []
    for steps in ranges:
        profile = builder.create_optimization_profile()
        for tensor in map(network.get_input, range(network.num_inputs)):
            batches = (1, shapes.batch, shapes.batch)
            profile.set_shape(
                tensor.name, *(_shape(tensor, batch, *step) for batch, step in zip(batches, steps, strict=True))
            )
        profiles.append(profile)
    return profiles


def _shape(tensor: Any, batch: int, sequence: int, kept: int) -> tuple[int, ...]:
    """The shape of a network input in a step: of a cache, only the first dimension is not known yet."""
    known = {INPUT_IDS: (batch, sequence), WRITE_INDICES: (batch,), LOGITS_INDICES: (batch, kept)}
    return known.get(tensor.name) or (batch, *tuple(tensor.shape)[1:])


def monitor_of(trt: Any, report: Callable[[float], None], built: Callable[[], None]) -> Any:
    """An IProgressMonitor.

    Args:
        trt: TensorRT's module.
        report: called with the fraction that is done, 0 to 1, never falling.
        built: called when the engine is made and will be serialised.

    Returns:
        The monitor; `stopped` holds what was raised in a callback, such as an interruption, which ends the build.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the module is chosen when running
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped: BaseException | None = None
            self._phases: list[list[Any]] = []  # name, steps, steps done; the innermost last
            self._best = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            with self._kept():
                self._phases.append([phase_name, num_steps, 0])

        def phase_finish(self, phase_name: str) -> None:
            with self._kept():
                names = [phase[0] for phase in self._phases]
                if phase_name in names:
                    del self._phases[len(names) - 1 - names[::-1].index(phase_name) :]
                if not self._phases:
                    built()

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._kept():
                for phase in self._phases:
                    if phase[0] == phase_name:
                        phase[2] = step + 1
                self._best = max(self._best, self._fraction())
                report(self._best)
            return self.stopped is None

        @contextmanager
        def _kept(self) -> Iterator[None]:
            try:
                yield
            except BaseException as error:  # noqa: BLE001 - TensorRT would print it and go on
                self.stopped = self.stopped or error

        def _fraction(self) -> float:
            inner = 0.0
            for _, steps, done in reversed(self._phases):
                inner = min((done + inner) / max(steps, 1), 1.0)
            return inner

    return Monitor()
