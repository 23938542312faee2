"""The checkpoint on transformers, through lm-eval's own backend: what a bundle's answers are laid beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer
from transformers.utils import logging

from exporter.checkpoint import Checkpoint
from exporter.parameters import expected_shapes, weight_source
from exporter.reference import Reference
from exporter.tasks import GENERATION, TASKS
from runtime.bundle import Bundle
from runtime.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Progress = Callable[[str, int, int], None]


def check_same_weights(bundle: Bundle, checkpoint: Checkpoint, progress: Progress = lambda *_: None) -> None:
    """Refuse a checkpoint that the bundle was not made from, by the fingerprint that its export noted.

    Args:
        bundle: of task text-generation.
        checkpoint: opened with the adapter that was merged, if any.
        progress: called with "checkpoint", the tensors that were read and their number.

    Raises:
        UserError: it is another checkpoint, or a tensor cannot be read.
    """
    shapes = expected_shapes(checkpoint.spec, TASKS[GENERATION])
    names = sorted({weight_source(name, checkpoint) for name in shapes})
    for name in names:
        if name not in checkpoint.tensors:
            raise UserError(f"{checkpoint.path}: tensor {name} is missing from the checkpoint; download it again")
    for done, name in enumerate(names, start=1):
        for _ in checkpoint.slices(name):
            pass
        progress("checkpoint", done, len(names))
    source, found = bundle.manifest.source, checkpoint.fingerprint()
    if source.fingerprint != found:
        merged = f" with the adapter {source.adapter} merged in" if source.adapter else ""
        raise UserError(
            f"{bundle.path} was not made from {checkpoint.path}: its fingerprint is {source.fingerprint[:12]}, the "
            f"checkpoint's {found[:12]}; give the checkpoint that it was exported from, {source.name}{merged}"
        )


class ReferenceLM(HFLM):  # type: ignore[misc]  # lm-eval is not typed throughout
    """lm-eval's transformers backend on a checkpoint, with eager attention, that tells how far it is and is quiet."""

    def __init__(
        self, checkpoint: Checkpoint, *, dtype: str, max_length: int, progress: Progress = lambda *_: None
    ) -> None:
        """Load the model: on a GPU where torch has one.

        Args:
            checkpoint: opened with its adapter, if any.
            dtype: of weights and activations, one of DTYPES.
            max_length: tokens of a row, as the bundle's.
            progress: called with "reference", requests that are done and their number.
        """
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns of texts that are cut later
        model = Reference(checkpoint).load(DTYPES[dtype]).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
        super().__init__(pretrained=model, tokenizer=tokenizer, max_length=max_length, batch_size=1, backend="causal")
        self._progress, self._steps = progress, 0
        self._expected = 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """As lm-eval has it."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """As lm-eval has it."""
        return super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """As lm-eval has it."""
        self._begin(len(requests))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None) -> Any:  # noqa: ARG002
        # Requests that differ in their last token only are one pass. Windows of a text come one by one.
        self._begin(len({(*context, *continuation[:-1]) for _, context, continuation in requests}))
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        return self._stepped(super()._model_call(*args, **kwargs))

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        return self._stepped(super()._model_generate(*args, **kwargs))

    def _begin(self, expected: int) -> None:
        self._steps, self._expected = 0, expected

    def _stepped(self, result: Any) -> Any:
        self._steps += 1
        self._progress("reference", self._steps, self._expected)
        return result
