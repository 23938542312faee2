"""Starts a driver with the Python of another environment: `python start.py MODULE ARGUMENT...`.

Of the directories beside this file that Python gets to see the package `exporter` alone: what else is there belongs to
our environment, and drivers are called like the libraries that they drive.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    here = Path(__file__).resolve()
    sys.path[:] = [place for place in sys.path if not place or Path(place).resolve() != here.parent]
    package = ModuleType("exporter")
    package.__path__ = [str(here.parents[1])]
    sys.modules["exporter"] = package
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
