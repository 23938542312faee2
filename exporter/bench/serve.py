"""What runs in a contender's process: one request a line on stdin, its seconds and tokens as a line of JSON on stdout.

    prompt STATE FILE ROWS LENGTH CAPACITY    a new STATE of that many prompts; answers their first new tokens
    decode STATE STEPS                        goes on with it; answers each step's tokens

FILE holds int32 token ids, ROWS × LENGTH of them or more; CAPACITY is how many tokens of a row will be written, prompt
and steps. Tokens are the likeliest ones, whichever end a text. The first line, unasked, says that the model is loaded,
and what is known of it. `unable` in an answer says why there are no tokens. This file and the drivers that import it
run in the environments of others: they need numpy, and no newer Python than those have.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class Unable(Exception):
    """What is asked for is beyond the model; the message says why."""


class Driver(Protocol):
    """A loaded model, and what it goes on from: states by name.

    Attributes:
        weight_bytes: of weights that a decode step reads: all matrices, and one row of the embedding; None where the
            driver cannot tell.
        cache_bytes: of keys and values, per token; None likewise.
        packages: whose versions are told.
    """

    weight_bytes: int | None
    cache_bytes: int | None
    packages: tuple[str, ...]

    def prompt(self, state: str, prompts: NDArray[np.int32], capacity: int) -> list[int]:
        """Begin `state` with prompts [rows, length], int32; each row's next token.

        Raises:
            Unable: rows, or their capacity, are more than it takes.
        """
        ...

    def step(self, state: str) -> list[int]:
        """Write the tokens that were given last; each row's next."""
        ...


def prompt(driver: Driver, state: str, file: str, rows: int, length: int, capacity: int) -> tuple[float, list[int]]:
    """Seconds until each row's first new token, and these."""
    prompts = np.fromfile(file, np.int32, rows * length).reshape(rows, length)
    started = time.perf_counter()
    tokens = driver.prompt(state, prompts, capacity)
    return time.perf_counter() - started, tokens


def decode(driver: Driver, state: str, steps: int) -> tuple[float, list[list[int]]]:
    """Seconds of that many steps, and their tokens [steps][rows]."""
    started = time.perf_counter()
    tokens = [driver.step(state) for _ in range(steps)]
    return time.perf_counter() - started, tokens


def serve(load: Callable[[], Driver]) -> None:
    """Load, then answer until stdin ends."""
    _end_with_parent()
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer

        def answer(**values: Any) -> None:
            answers.write(json.dumps(values) + "\n")
            answers.flush()

        driver = load()
        known = {"weight_bytes": driver.weight_bytes, "cache_bytes": driver.cache_bytes}
        answer(ready=True, versions=_versions(driver.packages), **known)
        for line in sys.stdin:
            try:
                seconds, tokens = _run(driver, line)
            except Unable as error:
                answer(unable=str(error))
            else:
                answer(seconds=seconds, tokens=tokens)


def _run(driver: Driver, line: str) -> tuple[float, Any]:
    word, state, rest = line.rstrip("\n").split(" ", 2)
    if word == "decode":
        return decode(driver, state, int(rest))
    file, *numbers = rest.rsplit(" ", 3)  # a path may have spaces
    return prompt(driver, state, file, *map(int, numbers))


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a build under another name
            continue
    return found


def _end_with_parent() -> None:
    """Have the kernel kill this process when its parent is gone: one that is stopped would wait for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
