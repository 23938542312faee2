"""Traces are the slow part of these tests: each structure is traced once, and tests get copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
from checkpoints import SMALL

from exporter.spec import NemotronSpec, spec_from_config

Traced = Callable[..., tuple[NemotronSpec, ir.Model]]


@pytest.fixture(scope="session")
def traced() -> Traced:
    """`traced(**config)`: the spec and a fresh copy of the trace of SMALL with these values over it."""
    from exporter.trace import trace

    done: dict[str, tuple[NemotronSpec, ir.Model]] = {}

    def copy(**config: Any) -> tuple[NemotronSpec, ir.Model]:
        key = repr(sorted(config.items()))
        if key not in done:
            spec = spec_from_config({"model_type": "nemotron", **SMALL, **config}, "test")
            done[key] = (spec, trace(spec))
        spec, model = done[key]
        return spec, model.clone()

    return copy
