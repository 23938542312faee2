"""Which packages belong to which optional part of the installation, and the command that adds it."""

from __future__ import annotations

DISTRIBUTION = "nemotron-export"

BASE = ("click", "jinja2", "numpy", "rich", "tokenizers")
# The extras of pyproject.toml (a test compares them).
EXTRAS = {
    "export": (
        *("huggingface-hub", "ml-dtypes", "onnx", "onnx-ir", "onnxscript", "safetensors", "sentencepiece"),
        *("torch", "transformers"),
    ),
    "cpu": ("onnxruntime",),
    "gpu": ("onnxruntime-gpu",),
    "tensorrt": ("tensorrt", "polygraphy", "cuda-python", "onnx"),
    "rtx": ("tensorrt-rtx", "polygraphy", "cuda-python", "onnx"),
    "plot": ("matplotlib",),
    "eval": ("lm-eval",),
}
_LM_EVAL_NEEDS = ("datasets",)
_LM_EVAL_TRANSFORMERS_NEEDS = ("accelerate", "peft")  # `eval --reference`, beside the extra `export`
EITHER_ONNXRUNTIME = (
    f"pip install '{DISTRIBUTION}[cpu]' or, with an NVIDIA GPU, '{DISTRIBUTION}[gpu]' (one of them, never both)"
)


def remedy_for(module: str | None) -> str | None:
    """The command that installs a module that could not be imported; None for one that is none of ours."""
    package = (module or "").partition(".")[0].replace("_", "-")
    if package in EXTRAS["export"]:
        return f"pip install '{DISTRIBUTION}[export,cpu]'"
    if package == "onnxruntime":
        return EITHER_ONNXRUNTIME
    if package in EXTRAS["plot"]:
        return f"pip install '{DISTRIBUTION}[plot]'"
    if package in (*EXTRAS["eval"], *_LM_EVAL_NEEDS):
        return f"pip install '{DISTRIBUTION}[eval]'"
    if package in _LM_EVAL_TRANSFORMERS_NEEDS:
        return "pip install 'lm-eval[hf]'"
    return f"pip install {DISTRIBUTION}" if package in BASE else None
