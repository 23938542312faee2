"""TensorRT's Python module, chosen once: `tensorrt` and `tensorrt_rtx` have one API under two names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from runtime.errors import UserError


@dataclass(frozen=True)
class Flavor:
    """One of the two TensorRTs: its module, our extra that installs it, and the oldest version that will do."""

    module: str
    extra: str
    oldest: tuple[int, int]

    @property
    def install(self) -> str:
        """The command that installs it, or a newer one."""
        return f"pip install --upgrade 'nemotron-export[{self.extra}]'"


# Before these versions attention has neither lengths nor a lower-right mask.
FLAVORS = {
    "tensorrt": Flavor("tensorrt", "tensorrt", (11, 0)),
    "tensorrt-rtx": Flavor("tensorrt_rtx", "rtx", (1, 7)),
}


def import_tensorrt(flavor: str) -> Any:
    """The Python module of a flavor: the only place that imports one.

    Raises:
        UserError: the flavor is unknown, not installed, does not load, or is too old.
    """
    if flavor not in FLAVORS:
        raise UserError(f"unknown flavor {flavor!r}; known: {', '.join(FLAVORS)}")
    known = FLAVORS[flavor]
    try:
        module = import_module(known.module)
    except ModuleNotFoundError as error:
        raise UserError(f"{flavor} is not installed; {known.install}") from error
    except (ImportError, OSError, RuntimeError) as error:  # its shared libraries are packages of their own
        reason = " ".join(str(error).split())
        raise UserError(f"{flavor} cannot be imported ({reason}); {known.install}") from error
    version = str(getattr(module, "__version__", "without a version"))
    if _numbers(version) < known.oldest:
        oldest = ".".join(map(str, known.oldest))
        raise UserError(f"{flavor} {version} is too old, {oldest} is the oldest that will do; {known.install}")
    return module


@dataclass
class Messages:
    """What TensorRT said, by severity."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)

    def reason(self) -> str:
        """The last error, in one line."""
        return " ".join(self.errors[-1].split()) if self.errors else "it gave no reason"


def logger(trt: Any, messages: Messages) -> Any:
    """TensorRT's logger, which writes into `messages` from now on and prints nothing.

    There is one in a process: TensorRT ignores a second as long as anything made with the first is alive.
    """
    log = _logger(trt)
    log.messages = messages
    return log


@cache
def _logger(trt: Any) -> Any:
    severity = trt.ILogger.Severity

    class Log(trt.ILogger):  # type: ignore[misc]  # the module is chosen when running
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages = Messages()

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                self.messages.errors.append(message)
            elif level == severity.WARNING:
                self.messages.warnings.append(message)
            elif level == severity.INFO:
                self.messages.details.append(message)

    return Log()


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
