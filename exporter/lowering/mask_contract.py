"""The contracts of Hugging Face exports: an attention mask goes in, the last tokens' logits come out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporter.passes.last_tokens import CONTRACT, last_columns, logits_to_keep, range_before, rightmost
from plugins.nodes import Nodes
from plugins.onnxruntime import lower_to_group_query_attention
from runtime.contract import ATTENTION_MASK, LOGITS, LOGITS_INDICES, WRITE_INDICES


def adopt_mask(graph: ir.Graph) -> list[str]:
    """Replace `write_indices` and `logits_indices` by `attention_mask` [batch, total] and `logits_to_keep` [1].

    A mask has ones for a row's real tokens, cached and new, then zeros; in a step of one token as many as one likes, so
    that its shape need not change with the past. A row that starts with 0, which is padded on the left, gets NaN
    logits: GroupQueryAttention would silently attend to the wrong keys.

    What comes of shapes and of `logits_to_keep` is computed apart from what comes of the mask's content, up to a Range:
    ONNX Runtime's CUDA provider computes the former on the host, the latter on the device, and captures no graph in
    which one is copied to the other.

    Returns:
        What the attention's operator could not do itself.
    """
    inputs = {value.name: value for value in graph.inputs}
    tokens = graph.inputs[0]
    mask = ir.val(ATTENTION_MASK, dtype=ir.DataType.INT64, shape=["batch", "total"])
    graph.inputs.insert(1, mask)
    before, after = Nodes(graph, CONTRACT), Nodes(graph, CONTRACT)

    valid = before("ReduceSum", mask, before.constant("axis_1", [1]), keepdims=0)  # [batch]
    total, sequence = before("Shape", mask, start=1, end=2), before("Shape", tokens, start=1, end=2)  # [1]
    last_key = before("Cast", before("Sub", valid, before.constant("one", 1)), to=ir.DataType.INT32)
    most = before("Cast", before("Squeeze", total), to=ir.DataType.INT32)
    fallbacks = lower_to_group_query_attention(graph, last_key, most, lambda: _positions(before, valid, sequence))
    if LOGITS_INDICES in inputs:
        _keep_last(graph, before, valid, before("Sub", sequence, total))
    _poison_left_padding(graph, before, after, mask)
    graph.insert_before(next(iter(graph)), before.take())
    graph.extend(after.take())
    graph.inputs.remove(inputs[WRITE_INDICES])
    return fallbacks


def keep_last_tokens(graph: ir.Graph) -> None:
    """Without a cache: `logits_to_keep` [1] in place of `logits_indices`, counted back from the mask's last one."""
    inputs = {value.name: value for value in graph.inputs}
    if LOGITS_INDICES not in inputs:
        return
    before = Nodes(graph, CONTRACT)
    real = before("Not", before("Equal", inputs[ATTENTION_MASK], before.constant("zero", 0)))
    _keep_last(graph, before, rightmost(before, real), before.constant("behind", [1]))
    graph.insert_before(next(iter(graph)), before.take())
    logits = next(value for value in graph.outputs if value.name == LOGITS)
    assert logits.shape is not None
    logits.shape = ir.Shape(["batch", 1, logits.shape[-1]])


def _keep_last(graph: ir.Graph, nodes: Nodes, ends: ir.Value, shift: ir.Value) -> None:
    keep = logits_to_keep()
    graph.inputs.append(keep)
    graph.initializers.add(keep)
    asked = next(value for value in graph.inputs if value.name == LOGITS_INDICES)
    ir.convenience.replace_all_uses_with(asked, last_columns(nodes, ends, shift, keep))
    graph.inputs.remove(asked)


def _positions(nodes: Nodes, valid: ir.Value, sequence: ir.Value) -> ir.Value:
    """Each token's position: a row's new tokens end its valid keys, or, in a prefill, start at 0 before padding."""
    ends = nodes("Unsqueeze", valid, nodes.constant("axis_1", [1]))
    nothing = nodes("Sub", sequence, sequence)  # no constant: the Squeeze of one would be computed on the device
    counted_back = nodes("Add", ends, range_before(nodes, nothing, sequence))
    return nodes("Max", counted_back, range_before(nodes, sequence, sequence))


def _poison_left_padding(graph: ir.Graph, before: Nodes, after: Nodes, mask: ir.Value) -> None:
    first = before("Gather", mask, before.constant("first", [0]), axis=1)  # [batch, 1]
    padded = before("Equal", before("Unsqueeze", first, before.constant("axis_2", [2])), before.constant("zero", 0))
    logits = next(value for value in graph.outputs if value.name == LOGITS)
    checked = after("Where", padded, before.constant("nan", np.float32(np.nan)), logits)
    assert logits.shape is not None
    # Declared 1, the default: a symbolic dimension beside an optional input was refused by a consumer.
    checked.shape, checked.type = ir.Shape(["batch", 1, logits.shape[-1]]), logits.type
    logits.name, checked.name = f"{LOGITS}.unchecked", LOGITS
    graph.outputs[list(graph.outputs).index(logits)] = checked
