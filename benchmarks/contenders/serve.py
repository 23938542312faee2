"""What runs in a contender's process: one request a line on stdin, its seconds and tokens as a line of JSON on stdout.

    prompt STATE FILE ROWS LENGTH CAPACITY    a new STATE of that many prompts; answers their first new tokens
    decode STATE STEPS                        goes on with it; answers each step's tokens

FILE holds int32 token ids, ROWS × LENGTH of them or more; CAPACITY is how many tokens of a row will be written, prompt
and steps. Tokens are the likeliest ones, whichever end a text. The first line, unasked, says that the model is loaded.
This file and its neighbours that import it run in the environments of others: it needs numpy alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Driver(Protocol):
    """A loaded model, and what it goes on from: states by name."""

    def prompt(self, state: str, prompts: NDArray[np.int32], capacity: int) -> list[int]:
        """Begin `state` with prompts [rows, length], int32; each row's next token."""
        ...

    def step(self, state: str) -> list[int]:
        """Write the tokens that were given last; each row's next."""
        ...


def serve(load: Callable[[], Driver]) -> None:
    """Load, then answer until stdin ends."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print is no answer

        def answer(**values: Any) -> None:
            answers.write(json.dumps(values) + "\n")
            answers.flush()

        driver = load()
        answer(ready=True)
        for line in sys.stdin:
            word, state, *rest = line.split()
            if word == "prompt":
                rows, length, capacity = map(int, rest[1:])
                prompts = np.fromfile(rest[0], np.int32, rows * length).reshape(rows, length)
                started = time.perf_counter()
                tokens: Any = driver.prompt(state, prompts, capacity)
            else:
                steps = range(int(rest[0]))
                started = time.perf_counter()
                tokens = [driver.step(state) for _ in steps]
            answer(seconds=time.perf_counter() - started, tokens=tokens)
