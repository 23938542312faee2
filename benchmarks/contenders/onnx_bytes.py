"""What a decode step reads of an ONNX graph's weights."""

from __future__ import annotations

from pathlib import Path

_TABLES = 7  # the first of GroupQueryAttention's inputs that is a table of rotary positions


def step_bytes(model: Path) -> int:
    """Bytes of all initializers that nodes read, but of tables (embedding, rotary positions) a row."""
    import onnx_ir as ir

    read: dict[str, int] = {}
    for node in ir.load(model).graph:
        for at, value in enumerate(node.inputs):
            if value is None or value.const_value is None or value.name is None:
                continue
            size = value.const_value.nbytes
            table = node.op_type.startswith("Gather") or (node.op_type == "GroupQueryAttention" and at >= _TABLES)
            read[value.name] = size // max(1, *value.const_value.shape.numpy()[:1]) if table else size
    return sum(read.values())
