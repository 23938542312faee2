"""Work that a thread does while another stage leaves a core idle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

import numpy as np

from exporter.checkpoint import Checkpoint
from exporter.tensor_files import Stamp, TensorInfo
from exporter.tensor_slices import read_into
from runtime.errors import UserError

_RUN = 1 << 26  # bytes that are hashed in one call, in which the thread needs nothing of the interpreter


@contextmanager
def hashed_ahead(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[None]:
    """Note digests of tensors for the fingerprint while the body runs; those it does not come to are noted when read.

    Args:
        checkpoint: whose tensors; those of pickles are left to their reading.
        names: of tensors that will be read in any case.
    """
    stopped = Event()

    def hash_all() -> None:
        with suppress(UserError, OSError):  # whoever reads the tensor for its content says what is wrong
            for name in dict.fromkeys(names):
                info = checkpoint.tensors[name]
                if not info.pickled and not checkpoint.note(name, _content(info, stopped)):
                    return

    thread = Thread(target=hash_all, name="hash ahead")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def _content(info: TensorInfo, stopped: Event) -> Iterator[memoryview | None]:
    """The bytes of a tensor in runs of one buffer; None in their place once one is told to stop."""
    buffer = np.empty(min(_RUN, info.nbytes), np.uint8).data
    with info.file.open("rb", buffering=0) as file:
        info.check_unchanged(Stamp.of(file.fileno()))
        at, end = info.offset, info.offset + info.nbytes
        while at < end:
            if stopped.is_set():
                yield None
                return
            run = buffer[: end - at]
            at = read_into(file.fileno(), run, at, info.file)
            yield run
