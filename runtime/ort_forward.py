"""A graph without a cache on ONNX Runtime; both targets' graphs run here."""

from __future__ import annotations

import numpy as np

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.forward import ForwardContract
from runtime.ort_model import check_model, load_model
from runtime.session import Floats, Ints
from runtime.steps import CONTRACTS


def check_whole_rows(bundle: Bundle, device: str) -> ForwardContract:
    """Refuse a bundle that no `OrtForward` runs, before anything is loaded; how its graph is driven.

    Args:
        bundle: an opened one.
        device: `cpu` or `cuda`.

    Raises:
        UserError: as `runtime.ort_model.check_model`, the graph has a cache, or the bundle is of an unknown target.
    """
    if bundle.manifest.target not in CONTRACTS:
        known = " or ".join(CONTRACTS)
        raise UserError(f"{bundle.path} is for {bundle.manifest.target}; export it with --target {known}")
    contract = ForwardContract(bundle)
    check_model(bundle, device)
    return contract


class OrtForward:
    """The ForwardSession over the ONNX graph. See `runtime.forward.ForwardSession` for what its members mean."""

    def __init__(self, bundle: Bundle, *, device: str = "cpu", threads: int | None = None) -> None:
        """Load the graph.

        Args:
            bundle: an opened bundle whose graph has no cache.
            device: `cpu` or `cuda`.
            threads: threads within an operator (default: one per core).

        Raises:
            UserError: onnxruntime or its CUDA provider is missing, the graph has a cache or cannot be loaded, or the
                bundle is of an unknown target or bf16.
        """
        self._contract = check_whole_rows(bundle, device)
        self._loaded = load_model(bundle, device, threads)
        self.backend, self.version, self.device = self._loaded.backend, self._loaded.version, self._loaded.device
        self.choice = ""
        self.max_length = bundle.manifest.max_length
        self._outputs = [spec.name for spec in bundle.manifest.graph.outputs]

    def run(
        self, input_ids: Ints, attention_mask: Ints, position_ids: Ints | None = None, *, keep: int = 1
    ) -> dict[str, Floats]:
        """Every output by its name, float32; see `ForwardSession.run`."""
        feeds = self._contract.feeds(input_ids, attention_mask, position_ids, keep=keep)
        with self._loaded.running("a batch"):
            values = self._loaded.model.run(self._outputs, feeds)
        return {name: np.asarray(value, np.float32) for name, value in zip(self._outputs, values, strict=True)}
