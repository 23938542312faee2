from __future__ import annotations

import sys
from pathlib import Path

import pytest
from environments import ROOT, run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The distribution that users install."""
    directory = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", directory, ROOT])
    return next(directory.glob("*.whl"))
