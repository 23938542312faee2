"""A bundle as a model of Triton Inference Server: `repository` writes what `model` serves by `config`'s description."""
