"""What the command line asks of its process: our own modules, tidying up when it is ended, few garbage collections."""

from __future__ import annotations

import _thread
import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

_PACKAGES = ("exporter", "runtime", "plugins")
_ENDINGS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_AGAIN = 0.05  # seconds until an interruption that was lost comes back

_COLLECT_AFTER = 50_000  # new objects; Python's 700 costs an export's imports and trace a tenth of their time


class Terminated(KeyboardInterrupt):
    """The process is asked to end, which is not the user's Ctrl-C but tidies up alike."""


@contextmanager
def interrupt_on_termination() -> Iterator[None]:
    """Within the body SIGTERM and SIGHUP raise `Terminated`, so that temporary directories are removed.

    An interruption is not lost where Python drops exceptions, in a destructor or a weak reference's callback, of which
    a trace runs thousands: it comes back a moment later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # One that is ignored (nohup) stays ignored.
    taken = [ending for ending in _ENDINGS if signal.getsignal(ending) is signal.SIG_DFL]
    for ending in taken:
        signal.signal(ending, _terminate)
    hook, sys.unraisablehook = sys.unraisablehook, _interrupt_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for ending in taken:
            signal.signal(ending, signal.SIG_DFL)


def collect_rarely() -> None:
    """Look for garbage less often: importing torch and tracing make objects by the million, nearly all to stay."""
    gc.set_threshold(_COLLECT_AFTER)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise Terminated


def _interrupt_again(dropped: UnraisableHookArgs) -> None:
    if not isinstance(dropped.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)
        return
    number = signal.SIGTERM if isinstance(dropped.exc_value, Terminated) else signal.SIGINT
    # Later: raised here, it would be dropped again. Where nobody handles the signal by then, nothing happens.
    timer = threading.Timer(_AGAIN, _thread.interrupt_main, (number,))
    timer.daemon = True
    timer.start()


def shadowing(root: Path = Path(__file__).parents[2]) -> str | None:
    """Say which of our three packages Python would import from elsewhere than this installation's `root`."""
    for name in _PACKAGES:
        expected = (root / name / "__init__.py").resolve()
        try:
            spec = find_spec(name)
        except ValueError:  # a module without a spec took the name
            spec = None
        if spec is None:
            return f"the package {name!r} is missing beside {root / 'exporter'}; install nemotron-export again"
        places = list(spec.submodule_search_locations or [])
        found = spec.origin or (places[0] if places else "an unknown place")
        if not spec.origin or Path(spec.origin).resolve() != expected:
            return (
                f"{found} shadows the {name!r} of nemotron-export in {root}; rename or uninstall it, or take "
                f"it off PYTHONPATH ({sys.prefix} is the environment)"
            )
    return None
