"""Names of the graphs' tensors: the agreement between exporter and runtime.

Both targets have

| tensor                     | dtype   | shape                                  |
|----------------------------|---------|----------------------------------------|
| `input_ids`                | int64   | [batch, sequence]                      |
| `logits`                   | float   | [batch, kept, vocab]                   |

and beside them, target `onnxruntime` (Hugging Face's names):

| tensor                     | dtype   | shape                                  |
|----------------------------|---------|----------------------------------------|
| `attention_mask`           | int64   | [batch, total]                         |
| `past_key_values.N.key`    | float   | [batch, kv_heads, past, head_dim]      |
| `past_key_values.N.value`  | float   | [batch, kv_heads, past, head_dim]      |
| `logits_to_keep`           | int64   | [1], default 1                         |
| `present.N.key`, `.value`  | float   | [batch, kv_heads, max(past, total), head_dim] |

`total` counts cached and new tokens; a row's mask is ones for its real tokens, then zeros (padding on the
right). Target `tensorrt`, which has no mask:

| tensor                     | dtype   | shape                                  |
|----------------------------|---------|----------------------------------------|
| `write_indices`            | int64   | [batch], cached tokens of each row     |
| `logits_indices`           | int64   | [batch, kept], columns of `input_ids`  |
| `past_key_values.N.key`    | float   | [batch, kv_heads, capacity, head_dim]  |
| `past_key_values.N.value`  | float   | [batch, kv_heads, capacity, head_dim]  |
| `present.N.key`, `.value`  | float   | the same, sharing memory with the past |

What a step feeds, and which rows can share one, is in `runtime.steps`.
"""

from __future__ import annotations

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
WRITE_INDICES = "write_indices"
LOGITS_INDICES = "logits_indices"
LOGITS_TO_KEEP = "logits_to_keep"
LOGITS = "logits"


def past_names(layer: int) -> tuple[str, str]:
    """The graph inputs that hold one layer's cached keys and values."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """The graph outputs that hold one layer's keys and values with the new tokens written."""
    return f"present.{layer}.key", f"present.{layer}.value"
