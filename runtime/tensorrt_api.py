"""TensorRT's Python module, chosen once: `tensorrt` and `tensorrt_rtx` have one API under two names."""

from __future__ import annotations

import re
from dataclasses import dataclass
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


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
