"""The contract of Hugging Face exports: an attention mask goes in, the last tokens' logits come out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from plugins.onnxruntime import lower_to_group_query_attention
from runtime.contract import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_INDICES,
    LOGITS_TO_KEEP,
    WRITE_INDICES,
)


class MaskContract:
    """Replaces `write_indices` and `logits_indices` by `attention_mask` [batch, total] and `logits_to_keep` [1].

    A mask has ones for a row's real tokens, cached and new, then zeros. A row that starts with 0, which is padded on
    the left, gets NaN logits: GroupQueryAttention would silently attend to the wrong keys.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.inputs = {value.name: value for value in graph.inputs}
        self.before, self.after = ir.tape.Tape(), ir.tape.Tape()
        self.mask = ir.val(ATTENTION_MASK, dtype=ir.DataType.INT64, shape=["batch", "total"])
        self.keep = ir.val(LOGITS_TO_KEEP, const_value=ir.tensor(np.array([1], np.int64), name=LOGITS_TO_KEEP))

    def adopt(self) -> None:
        """Change inputs, attention and logits."""
        graph = self.graph
        graph.inputs.insert(1, self.mask)
        graph.inputs.append(self.keep)
        graph.initializers.add(self.keep)  # an input with an initializer is optional: 1 where it is not given

        valid = self._op("ReduceSum", self.mask, self._const("axis_1", [1]), keepdims=0)  # [batch]
        total = self._op("Shape", self.mask, start=1, end=2)  # [1]
        self._lower_attentions(valid, total)
        self._keep_last_logits(valid, total)
        self._poison_left_padding()

        graph.insert_before(next(iter(graph)), self.before.nodes)
        graph.extend(self.after.nodes)
        for name in (WRITE_INDICES, LOGITS_INDICES):
            graph.inputs.remove(self.inputs[name])

    def _lower_attentions(self, valid: ir.Value, total: ir.Value) -> None:
        last_key = self._op("Cast", self._op("Sub", valid, self._const("one", 1)), to=ir.DataType.INT32)
        most = self._op("Cast", self._op("Squeeze", total), to=ir.DataType.INT32)
        lower_to_group_query_attention(self.graph, last_key, most)

    def _keep_last_logits(self, valid: ir.Value, total: ir.Value) -> None:
        """Indices of each row's last `logits_to_keep` real tokens within the step, none below 0."""
        zero, one = self._const("zero", 0), self._const("one", 1)
        sequence = self._op("Shape", self.inputs[INPUT_IDS], start=1, end=2)
        past = self._op("Sub", total, sequence)
        last = self._op("Sub", self._op("Sub", valid, one), past)  # [batch]
        keep = self._op("Squeeze", self.keep)
        back = self._op("Sub", self._op("Range", zero, keep, one), self._op("Sub", keep, one))  # 1 - keep … 0
        column = self._op("Unsqueeze", last, self._const("axis_1", [1]))
        indices = self._op("Max", self._op("Add", column, back), zero)
        ir.convenience.replace_all_uses_with(self.inputs[LOGITS_INDICES], indices)

    def _poison_left_padding(self) -> None:
        first = self._op("Gather", self.mask, self._const("first", [0]), axis=1)  # [batch, 1]
        padded = self._op("Equal", self._op("Unsqueeze", first, self._const("axis_2", [2])), self._const("zero", 0))

        logits = next(value for value in self.graph.outputs if value.name == LOGITS)
        checked = self.after.op("Where", [padded, self._const("nan", np.float32(np.nan)), logits])
        assert logits.shape is not None
        # Declared 1, the default: a symbolic dimension beside an optional input was refused by a consumer.
        checked.shape, checked.type = ir.Shape(["batch", 1, logits.shape[-1]]), logits.type
        logits.name, checked.name = f"{LOGITS}.unchecked", LOGITS
        self.graph.outputs[list(self.graph.outputs).index(logits)] = checked

    def _op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return self.before.op(op_type, list(inputs), attributes)

    def _const(self, name: str, value: Any) -> ir.Value:
        name = f"contract.{name}"
        if name not in self.graph.initializers:
            self.graph.initializers.add(ir.val(name, const_value=ir.tensor(np.asarray(value), name=name)))
        return self.graph.initializers[name]
