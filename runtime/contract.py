"""Names of the graphs' tensors: the agreement between exporter and runtime.

With a cache (task text-generation) both targets have

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

With an int8 cache `past_key_values.N.*` and `present.N.*` are int8; what they stand for is integer · scale, one scale
for each channel of each head, which are in `kv_scales.npz` and in the graph. The graph rounds what it caches, and
multiplies what it has rounded, of the step's own tokens too.

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

A graph without a cache ("forward graph") of either target has

| tensor                     | dtype   | shape                                  |
|----------------------------|---------|----------------------------------------|
| `input_ids`                | int64   | [batch, sequence]                      |
| `attention_mask`           | int64   | [batch, sequence], 1 = real; padding on either side |

and, for task text-generation, `logits_to_keep` (target `onnxruntime`) or `logits_indices` (target `tensorrt`) as
above. Its outputs, all float32, by task:

| task                       | output                      | shape                       |
|----------------------------|-----------------------------|-----------------------------|
| feature-extraction         | `last_hidden_state`         | [batch, sequence, hidden]   |
| text-classification        | `logits`                    | [batch, labels]             |
| token-classification       | `logits`                    | [batch, sequence, labels]   |
| question-answering         | `start_logits`, `end_logits` | [batch, sequence]          |
| text-generation            | `logits`                    | [batch, kept, vocab], of each row's last kept real tokens |

Where an export asked for them, with or without a cache:

| tensor                     | dtype   | shape                                  |
|----------------------------|---------|----------------------------------------|
| input `inputs_embeds`      | float32 | [batch, sequence, hidden], in place of `input_ids` |
| input `position_ids`       | int64   | [batch, sequence]; default: past + 0, 1, … in every row |
| output `hidden_states.N`   | float32 | [batch, sequence, hidden], N from 0 (the embeddings) to layers |
| output `attentions.N`      | float32 | [batch, heads, sequence, sequence], without a cache only |

A bundle whose graph takes `inputs_embeds` carries the rows to look up, `embed_tokens.npy` [vocab, hidden].
"""

from __future__ import annotations

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
WRITE_INDICES = "write_indices"
LOGITS_INDICES = "logits_indices"
LOGITS_TO_KEEP = "logits_to_keep"
LOGITS = "logits"
INPUTS_EMBEDS = "inputs_embeds"
POSITION_IDS = "position_ids"
LAST_HIDDEN_STATE = "last_hidden_state"
START_LOGITS = "start_logits"
END_LOGITS = "end_logits"

EMBED_TOKENS = "embed_tokens.npy"  # a file of the bundle


def past_names(layer: int) -> tuple[str, str]:
    """The graph inputs that hold one layer's cached keys and values."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """The graph outputs that hold one layer's keys and values with the new tokens written."""
    return f"present.{layer}.key", f"present.{layer}.value"


def hidden_states_name(index: int) -> str:
    """The graph output that holds the hidden states after `index` layers: 0 is the embeddings."""
    return f"hidden_states.{index}"


def attentions_name(layer: int) -> str:
    """The graph output that holds one layer's attention probabilities."""
    return f"attentions.{layer}"
