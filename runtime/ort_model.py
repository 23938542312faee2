"""A bundle's graph loaded by ONNX Runtime: the library, the provider, and what goes wrong in words."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from runtime.bundle import Bundle
from runtime.driver import find_driver
from runtime.errors import CheckFailed, UserError
from runtime.hardware import cpu_name, cuda_name
from runtime.kv_cache import numpy_dtype
from runtime.manifest import MODEL

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

# Neither each other's nor RuntimeError's relatives; what a binding raises, and what `run` does, differ.
_ERRORS = (
    *("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented"),
    "RuntimeException",  # no memory, for one
)
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


@dataclass(frozen=True)
class OrtModel:
    """A loaded graph; `backend`, `version` and `device` are those of `runtime.session.Session`.

    `failures` are what ONNX Runtime raises when a graph does not run; `captures`: whether runs may become CUDA graphs.
    """

    bundle: Bundle
    model: InferenceSession
    backend: str
    version: str
    device: str
    failures: tuple[type[Exception], ...]
    captures: bool = False

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Explain what is raised when a step does not become a CUDA graph.

        Raises:
            UserError: names the way without.
        """
        try:
            yield
        except self.failures as error:
            reason = _reason(error)
            raise UserError(
                f"{self.backend} cannot capture a step of {self.bundle.path} as a CUDA graph: {reason}; "
                "open it without capture"
            ) from error

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """Explain what is raised when an operator refuses its inputs, or memory is short.

        Raises:
            UserError: no memory for `what`.
            CheckFailed: the graph does not run.
        """
        try:
            yield
        except self.failures as error:
            reason = _reason(error)
            if "allocate memory" in reason or "bad_alloc" in reason:
                raise UserError(
                    f"{self.backend} has no memory for {what}: {reason}; take fewer or shorter prompts at once"
                ) from error
            raise CheckFailed(
                f"{self.backend} cannot run {what} of {self.bundle.path}: {reason}; "
                "run nemotron-export selftest, then copy or export the bundle again"
            ) from error


def import_onnxruntime() -> ModuleType:
    """The onnxruntime module, imported without its telemetry unless the user has said otherwise.

    Raises:
        UserError: it is not installed; names both extras.
    """
    # Else its import writes a device id and an event database into the user's cache directory, to be sent home.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise UserError(
            "onnxruntime is not installed; pip install 'nemotron-export[cpu]' or, with an NVIDIA GPU, "
            "'nemotron-export[gpu]' (one of them, never both)"
        ) from error


def check_model(bundle: Bundle, device: str) -> ModuleType:
    """Refuse what can be known not to load before anything is loaded; the onnxruntime module that would.

    Args:
        bundle: of any task and target.
        device: `cpu` or `cuda`.

    Raises:
        UserError: onnxruntime, its CUDA provider or a GPU for it is missing, or the graph is bf16.
    """
    ort = import_onnxruntime()
    if bundle.manifest.activations == "bf16":
        numpy_dtype("bfloat16")  # refused here, where the user reads why, not by a missing kernel
    provider = _PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise UserError(
            f"this onnxruntime {ort.__version__} has no {provider}; "
            "pip uninstall onnxruntime, then pip install 'nemotron-export[gpu]', or use --device cpu"
        )
    if device == "cuda" and not ((driver := find_driver()) and driver.gpus):
        raise UserError(f"{provider} has no NVIDIA GPU that is visible here; check nvidia-smi, or use --device cpu")
    return ort


def load_model(
    bundle: Bundle, device: str, threads: int | None, part: bytes | None = None, *, capture: bool = False
) -> OrtModel:
    """Load a bundle's graph, or a part of it.

    Args:
        bundle: of any task and target.
        device: `cpu` or `cuda`.
        threads: threads within an operator (default: one per core).
        part: an ONNX model whose external data is the bundle's; it is run a few times, so that weights which operators
            can read as they are stay mapped.
        capture: whether the graph's runs on `cuda` are to become CUDA graphs.

    Raises:
        UserError: as `check_model`, the graph cannot be loaded or captured, or `threads` is out of range.
    """
    ort = check_model(bundle, device)
    if threads is not None and threads < 1:
        raise UserError(f"threads should be at least 1, not {threads}")
    provider = _PROVIDERS[device]
    errors: tuple[type[Exception], ...] = tuple(getattr(ort.capi.onnxruntime_pybind11_state, n) for n in _ERRORS)
    options = _options(ort, bundle, threads)
    if part is not None:
        options.add_session_config_entry(_DATA_FOLDER, str(bundle.path.resolve()))
        if not bundle.manifest.quantization:  # packing copies every matrix; products with few bits are others without
            options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        model: InferenceSession = ort.InferenceSession(
            bundle.file(MODEL) if part is None else part,
            options,
            providers=[
                (provider, {"enable_cuda_graph": "1"}) if capture else provider,
                *({_PROVIDERS["cpu"]} - {provider}),
            ],
        )
    except errors as error:
        raise _not_loaded(ort, bundle, error) from error
    if provider not in model.get_providers():
        raise UserError(
            f"{provider} did not start (its CUDA libraries are missing or too old); "
            "pip install 'nemotron-export[gpu]' in an environment of its own, or use --device cpu"
        )
    name = cpu_name() if device == "cpu" else cuda_name()
    return OrtModel(
        bundle, model, f"onnxruntime-{device}", str(ort.__version__), name, (RuntimeError, *errors), capture
    )


def _reason(error: Exception) -> str:
    """What ONNX Runtime says, in one line that is not too long."""
    return " ".join(str(error).split())[:300]


def _not_loaded(ort: ModuleType, bundle: Bundle, error: Exception) -> UserError:
    """What ONNX Runtime has against a graph, and what helps."""
    reason = _reason(error)
    if "graph capture" in reason:  # its words where operators are on the host, or data goes there and back
        return UserError(
            f"onnxruntime {ort.__version__} refuses to capture {bundle.file(MODEL)}: {reason}; "
            "export the bundle again, or open it without capture"
        )
    return UserError(
        f"onnxruntime {ort.__version__} cannot load {bundle.file(MODEL)}: {reason}; "
        "check the bundle (nemotron-export selftest), or export it again"
    )


def _options(ort: ModuleType, bundle: Bundle, threads: int | None) -> SessionOptions:
    """How the graph is loaded; what concerns DequantizeLinear is of target `tensorrt`, whose weights it reads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 4  # errors come as exceptions, and are told once
    # Else a product with int4 rounds its activations to 8 bits, which the graph does not ask for.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if "fp8" in bundle.manifest.precisions:
        # There is no product with fp8: else every weight is dequantised anew at each step, not once when loaded.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options
