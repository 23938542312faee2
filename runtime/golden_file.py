"""`golden.npz`, whatever cases it holds: read without pickles, and named where it is damaged."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import UserError

STEPS, FORWARD = "steps", "forward"  # `kind`: calls of Session.step, or of ForwardSession.run; absent is STEPS


@contextmanager
def reading(path: Path, kind: str) -> Iterator[Any]:
    """The file's arrays by name; what goes wrong while they are read is told as damage.

    Raises:
        UserError: the file is damaged, of another schema, or holds another kind of cases.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if int(arrays["schema"]) != 1:
                raise UserError(f"{path} has another schema; upgrade nemotron-export, or export again")
            found = str(arrays["kind"]) if "kind" in arrays else STEPS
            if found != kind:
                raise UserError(f"{path} holds cases of kind {found!r}, not {kind!r}; export the bundle again")
            yield arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged; copy or export the bundle again") from error
