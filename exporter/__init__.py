"""Checkpoint to bundle: trace, passes, lowering, weights and the parity gate."""

__version__ = "0.1.0"
