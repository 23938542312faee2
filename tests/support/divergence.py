"""What an export lost, by its own record."""

from __future__ import annotations

from runtime.bundle import Bundle


def divergence(bundle: Bundle) -> float:
    """The mean KL divergence from transformers of a bundle that has passed its gate."""
    assert bundle.manifest.parity is not None
    assert bundle.manifest.parity.passed
    assert bundle.manifest.quality is not None
    return bundle.manifest.quality.kl_mean
