"""sha256 of a file by a thread of its own, as far as the file is there."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from exporter.tensor_slices import read_into
from runtime.manifest import FileRecord

_CHUNK = 1 << 22  # read and hashed at once
_BATCH = 16 * _CHUNK  # what an interruption waits for


class FileDigest:
    """The digest of an open file. The thread has ended when the `with` body is left, however it is."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor, self._path = descriptor, path
        self._digest, self._end = sha256(), 0
        self._thread = ThreadPoolExecutor(1, "hash")
        self._pending: list[Future[None]] = []

    def to(self, end: int) -> None:
        """Hash up to here, some time soon: these bytes do not change any more.

        Raises:
            UserError, OSError: what was asked for before could not be read.
        """
        while self._end < end:
            batch = min(_BATCH, end - self._end)
            self._pending.append(self._thread.submit(self._hash, self._end, self._end + batch))
            self._end += batch
        while len(self._pending) > 1 and self._pending[0].done():
            self._pending.pop(0).result()

    def record(self) -> FileRecord:
        """Hash and size of what was asked for, once it is done.

        Raises:
            UserError, OSError: it could not be read.
        """
        for pending in self._pending:
            pending.result()
        return FileRecord(sha256=self._digest.hexdigest(), bytes=self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _hash(self, start: int, end: int) -> None:
        buffer = np.empty(_CHUNK, np.uint8).data
        while start < end:
            part = buffer[: min(_CHUNK, end - start)]
            start = read_into(self._descriptor, part, start, self._path)
            self._digest.update(part)
