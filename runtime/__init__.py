"""From a bundle to text, labels, answers or embeddings, without torch or transformers.

>>> from runtime import load
>>> model = load("artifacts/tiny-nemotron-onnxruntime-fp32")
>>> for event in model.stream("Complete the paragraph: our solar system is", max_new_tokens=64):
...     print(event.text, end="", flush=True)
>>> result = model.generate([model.encode_chat([{"role": "user", "content": "What is a moon?"}])])
>>> result.sequences[0].text

>>> load("./embedder").embed(["Mars is red.", "The Sun is a star."]) @ load("./embedder").embed(["a planet"]).T
>>> load("./sentiment").classify(["Well done."])[0].labels[0]
>>> load("./names").tag(["Galileo looked at Jupiter."])[0].entities()
>>> load("./answers").answer("What is red?", "Mars is red with rust.")[0].text

>>> from runtime import pipeline  # arguments and results as transformers' pipelines have them
>>> pipeline("text-generation", "./bundle")("Our solar system is", do_sample=False)[0]["generated_text"]
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from runtime.pipelines import pipeline

if TYPE_CHECKING:
    from runtime.predict.features import FeatureExtractor
    from runtime.predict.question_answering import QuestionAnswerer
    from runtime.predict.text_classification import TextClassifier
    from runtime.predict.token_classification import TokenClassifier
    from runtime.text_generation import TextGenerator

__all__ = ["load", "pipeline"]


class Placement(TypedDict, total=False):
    """Where a bundle runs.

    Attributes:
        backend: `onnxruntime`, `tensorrt`, `tensorrt-rtx`; or `auto` (default), whose choice the result tells.
        device: where ONNX Runtime runs, `cpu` (default) or `cuda`.
        threads: threads within an operator (default: the backend's own choice).
    """

    backend: str
    device: str | None
    threads: int | None


@overload
def load(bundle: str | Path, *, task: Literal["text-generation"], **placement: Unpack[Placement]) -> TextGenerator: ...
@overload
def load(
    bundle: str | Path, *, task: Literal["feature-extraction"], **placement: Unpack[Placement]
) -> FeatureExtractor: ...
@overload
def load(
    bundle: str | Path, *, task: Literal["text-classification"], **placement: Unpack[Placement]
) -> TextClassifier: ...
@overload
def load(
    bundle: str | Path, *, task: Literal["token-classification"], **placement: Unpack[Placement]
) -> TokenClassifier: ...
@overload
def load(
    bundle: str | Path, *, task: Literal["question-answering"], **placement: Unpack[Placement]
) -> QuestionAnswerer: ...
@overload
def load(bundle: str | Path, *, task: None = None, **placement: Unpack[Placement]) -> Any: ...
def load(bundle: str | Path, *, task: str | None = None, **placement: Unpack[Placement]) -> Any:
    """Open a bundle on a backend, ready to run.

    The first time a bundle meets a device or a version of the backend, its golden cases are replayed there;
    that it passed is remembered in the user's cache directory.

    Args:
        bundle: the bundle's directory.
        task: what the bundle should be for; the type of the result follows from it.
        placement: where it runs, see `Placement`.

    Returns:
        By the bundle's task: text-generation a `TextGenerator`, feature-extraction a `FeatureExtractor`,
        text-classification a `TextClassifier`, token-classification a `TokenClassifier`, question-answering a
        `QuestionAnswerer`.

    Raises:
        UserError: the bundle is not whole, is for another task, or the backend cannot run it.
        CheckFailed: what it computes here is not the exported model.
    """
    started = time.perf_counter()
    from runtime.bundle import Bundle
    from runtime.golden import prove
    from runtime.session import open_session
    from runtime.text_generation import TextGenerator

    opened = Bundle.open(bundle)
    if task is not None:
        opened.check_task(task)
    if opened.manifest.task != "text-generation":
        from runtime.predict import open_predictor

        return open_predictor(opened, **placement)
    session = open_session(opened, slots=1, capacity=1, **placement)
    loaded = time.perf_counter()
    prove(opened, session)
    proven = time.perf_counter()
    return TextGenerator(opened, session, proven - started, proven - loaded)
