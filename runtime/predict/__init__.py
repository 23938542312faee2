"""What `load` returns for graphs without a cache: texts in; embeddings, labels, tags or answers out."""

from __future__ import annotations

from runtime.bundle import Bundle
from runtime.errors import UserError
from runtime.predict.predictor import Predictor


def open_predictor(
    bundle: Bundle, *, backend: str = "auto", device: str | None = None, threads: int | None = None
) -> Predictor:
    """The predictor of the bundle's task, its golden cases replayed where they have not passed before.

    Args:
        bundle: of any task but text-generation.
        backend, device, threads: as `runtime.load` takes them.

    Raises:
        UserError: a task that is not known, or a backend that cannot run it.
        CheckFailed: what it computes here is not the exported model.
    """
    from runtime.forward import open_forward
    from runtime.golden import prove_forward
    from runtime.predict.features import FeatureExtractor
    from runtime.predict.question_answering import QuestionAnswerer
    from runtime.predict.text_classification import TextClassifier
    from runtime.predict.token_classification import TokenClassifier

    known: tuple[type[Predictor], ...] = (FeatureExtractor, TextClassifier, TokenClassifier, QuestionAnswerer)
    kind = {kind.task: kind for kind in known}.get(bundle.manifest.task)
    if kind is None:
        tasks = ", ".join(["text-generation", *(kind.task for kind in known)])
        raise UserError(f"{bundle.path} is for {bundle.manifest.task!r}; known: {tasks}")
    session = open_forward(bundle, backend=backend, device=device, threads=threads)
    predictor = kind(bundle, session)  # labels are checked before anything runs
    prove_forward(bundle, session)
    return predictor
