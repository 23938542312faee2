"""Benchmarks by lm-evaluation-harness (`lm-eval`) of a bundle, and of its checkpoint on transformers beside it."""
