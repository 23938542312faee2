"""From a bundle to text, without torch or transformers.

>>> from runtime import load
>>> model = load("artifacts/tiny-nemotron-onnxruntime-fp32")
>>> for event in model.stream("Complete the paragraph: our solar system is", max_new_tokens=64):
...     print(event.text, end="", flush=True)
>>> result = model.generate([model.encode_chat([{"role": "user", "content": "What is a moon?"}])])
>>> result.sequences[0].text
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.text_generation import TextGenerator

__all__ = ["load"]


def load(
    bundle: str | Path, *, backend: str = "auto", device: str | None = None, threads: int | None = None
) -> TextGenerator:
    """Open a bundle on a backend, ready to generate.

    The first time a bundle meets a device or a version of the backend, its golden cases are replayed there;
    that it passed is remembered in the user's cache directory.

    Args:
        bundle: the bundle's directory.
        backend: `onnxruntime`, `tensorrt`, `tensorrt-rtx`; or `auto`, whose `choice` the result tells.
        device: where ONNX Runtime runs, `cpu` (default) or `cuda`.
        threads: threads within an operator (default: the backend's own choice).

    Raises:
        UserError: the bundle is not whole, or the backend cannot run it.
        CheckFailed: what it computes here is not the exported model.
    """
    started = time.perf_counter()
    from runtime.bundle import Bundle
    from runtime.golden import prove
    from runtime.session import open_session
    from runtime.text_generation import TextGenerator

    opened = Bundle.open(bundle)
    session = open_session(opened, backend=backend, device=device, slots=1, capacity=1, threads=threads)
    prove(opened, session)
    return TextGenerator(opened, session, time.perf_counter() - started)
