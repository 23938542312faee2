"""A machine with a GPU, played by the fakes, and a bundle with engines on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from fake_tensorrt import FakeContext, FakeCuda, FakeTensorRT, plan_of

from runtime.bundle import Bundle, describe_files
from runtime.manifest import MODEL, Engine
from runtime.trt_session import TrtSession

CAPACITY, BATCH, WIDTH, KEPT = 48, 3, 6, 4


@dataclass
class Machine:
    """A machine with a GPU, and a bundle with engines on it."""

    cuda: FakeCuda
    trt: FakeTensorRT
    path: Path

    @property
    def bundle(self) -> Bundle:
        return Bundle.open(self.path)

    def add_engine(self, plan: bytes | None = None, **changes: Any) -> None:
        """Put an engine into the bundle as `build` does."""
        manifest = self.bundle.manifest
        flavor, version = changes.get("flavor", "tensorrt"), changes.get("version", "11.4.0.1")
        name = f"engines/{flavor}-{version}-sm89/model.plan"
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(plan or plan_of(self.path / MODEL))
        fields = {
            "path": name, "flavor": "tensorrt", "version": "11.4.0.1", "capabilities": ("8.9",),
            "max_batch_size": BATCH, "max_input_len": WIDTH, "max_seq_len": CAPACITY, "max_kept": KEPT,
            "precision": "fp32", "causality": "lower-right", "graph_sha256": manifest.files[MODEL].sha256,
        }  # fmt: skip
        engines = (*manifest.engines, Engine(**(fields | changes)))
        replace(manifest, engines=engines, files=describe_files(self.path)).save(self.path)

    def context(self, width: int) -> FakeContext:
        """The one that runs steps of this width."""
        (found,) = [c for c in self.trt.contexts if c.profile["width"][1] == width]
        return found


def session_of(machine: Machine, **options: Any) -> TrtSession:
    return TrtSession(machine.bundle, **({"slots": BATCH} | options))


def tokens_of(*lengths: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(seed).integers(3, 2048, (len(lengths), max(lengths)))
    return tokens, np.array(lengths)
