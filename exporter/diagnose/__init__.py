"""Where a bundle first differs from transformers, and why: both go through the model side by side, layer by layer.

Every layer is also given to transformers with the bundle's own input, so that what is wrong by itself and what only
inherits a difference are told apart. Within a layer that is wrong the first value that differs is found, and the bug
that makes the bundle give just that; see `exporter.diagnose.cause`.
"""
