"""SplitAttention and MergeAttention in Triton: launched on a GPU, interpreted on a CPU, or compiled ahead of time.

`shape` needs no Triton; every other module here imports it.

A kernel's parameters stand in the order in which TensorRT passes them to an ahead-of-time plugin: pointers to the
inputs, extra arguments, pointers to the outputs. Extra arguments are symbolic int32, made of the inputs' dimensions;
everything else that a kernel must know is compiled in. What `tensorrt.plugin` is given for each op:

| | SplitAttention | MergeAttention |
|-|----------------|----------------|
| inputs | query, cos, sin, key_cache, value_cache, lengths | maxima, sums, contexts, lengths |
| extra arguments | query's dimension 1 (sequence), key_cache's 2 (capacity) | maxima's 2 (sequence), its 3 (blocks) |
| outputs | maxima, sums, contexts | context |
| grid | `AttentionShape.split_grid` | `AttentionShape.merge_grid` |
| kernel, block, shared memory | `Compiled.name`, `.cubin` or `.ptx`, `.threads`, `.shared_bytes` | the same |
| tactics | `SPLIT_CONFIGS[head_dim]` | `MERGE_CONFIGS` |

Symbolic integers have +, -, *, //, and `tensorrt.plugin`'s cdiv, max and min: what `blocks_of` and the grids need.
`registration` gives them; `plugins.split_lowering` puts the ops into the graph that an engine is built of.
"""
