"""A node's attributes, read so that none is overlooked."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from exporter.evaluate.program import CannotEvaluate


class Attributes:
    """A node's attributes; one that is never read is one whose meaning would be ignored."""

    def __init__(self, node: ir.Node) -> None:
        self.node = node
        self.label = f"{node.domain + '::' if node.domain else ''}{node.op_type} {node.name or node.outputs[0].name}"
        self._unread = set(node.attributes)

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute's value, or what the specification says where it is not given."""
        self._unread.discard(name)
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def only(self, name: str, default: Any, *known: Any) -> Any:
        """The value, which must be one of those known."""
        value = self.get(name, default)
        if value not in {default, *known}:
            raise CannotEvaluate(f"{name}={value!r} of {self.label}")
        return value

    def finish(self) -> None:
        """Refuse a node with an attribute that nobody asked for."""
        for name in sorted(self._unread):
            raise CannotEvaluate(f"attribute {name} of {self.label}")
