"""What pipelines share: arguments of the pipeline under those of a call, and what a text may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

from runtime.errors import UserError

Model = TypeVar("Model")


class Pipeline(Generic[Model]):
    """A loaded bundle, called with what it should work on.

    Attributes:
        task: of the bundles it runs.
        known: the arguments that a call takes.
        model: what `runtime.load` returns for such a bundle.
    """

    task: ClassVar[str]
    known: ClassVar[tuple[str, ...]]

    def __init__(self, model: Model, **defaults: Any) -> None:
        """Run a loaded bundle; `defaults` are arguments of each call that does not say otherwise.

        Raises:
            UserError: an argument is not known.
        """
        self.check(defaults)
        self.model = model
        self._defaults = defaults

    @classmethod
    def check(cls, arguments: Mapping[str, Any]) -> None:
        """Refuse arguments that a call does not take.

        Raises:
            UserError: names them, and those that there are.
        """
        if unknown := [name for name in arguments if name not in cls.known]:
            raise UserError(f"{cls.task} does not take {', '.join(unknown)}; known: {', '.join(sorted(cls.known))}")

    def _arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments over the pipeline's."""
        self.check(given)
        return {**self._defaults, **given}


def as_texts(inputs: object) -> tuple[list[str], bool]:
    """The texts of a call, and whether it was one alone.

    Raises:
        UserError: neither a text nor a list of texts.
    """
    if isinstance(inputs, str):
        return [inputs], True
    texts = inputs if isinstance(inputs, list | tuple) else [inputs]
    if wrong := [type(text).__name__ for text in texts if not isinstance(text, str)]:
        raise UserError(f"inputs should be a text or a list of texts; found {wrong[0]}")
    return [str(text) for text in texts], False
