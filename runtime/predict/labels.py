"""The names of a head's classes, from the checkpoint's configuration."""

from __future__ import annotations

from runtime.bundle import Bundle
from runtime.contract import LOGITS
from runtime.errors import UserError


def labels_of(bundle: Bundle) -> list[str]:
    """`id2label` of config.json in the order of the logits; where there is none, LABEL_0… as transformers has it.

    Raises:
        UserError: the labels are not as many as the graph's logits, or do not count from 0.
    """
    named = bundle.config.get("id2label")
    if named is None:
        count = bundle.config.get("num_labels", 2)  # transformers' default, which it does not write
        named = {number: f"LABEL_{number}" for number in range(count)} if isinstance(count, int) else None
    remedy = "correct id2label in the checkpoint's config.json, and export again"
    if not isinstance(named, dict):
        raise UserError(f"{bundle.path}: id2label should be an object, found {named!r}; {remedy}")
    labels = {str(key): str(label) for key, label in named.items()}
    logits = next((spec for spec in bundle.manifest.graph.outputs if spec.name == LOGITS), None)
    width = logits.shape[-1] if logits is not None else len(labels)
    if isinstance(width, int) and width != len(labels):
        raise UserError(f"{bundle.path} names {len(labels)} labels, its graph has {width}; {remedy}")
    if set(labels) != {str(number) for number in range(len(labels))}:
        keys = ", ".join(labels)
        raise UserError(f"{bundle.path}: id2label should have the keys 0 to {len(labels) - 1}, found {keys}; {remedy}")
    return [labels[str(number)] for number in range(len(labels))]
