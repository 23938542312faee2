"""Where ONNX Runtime's CUDA provider computes the nodes of our graphs, and what it copies between host and device.

Written from ONNX Runtime's documented kernels and its sources: the provider takes every node that it has a kernel for,
then hands back to the CPU those whose inputs are all on the host, constants of up to 100 elements or graph inputs, if
one of them comes of another node (GetCpuPreferredNodes); a value that is made on one side and read on the other gets
a copy (MemcpyTransformer), and one copy is enough for a session to refuse to capture (InferenceSession::Initialize).
"""

from __future__ import annotations

import math

import onnx

KERNELS = {
    *("Add", "Cast", "Equal", "Gather", "GatherND", "LayerNormalization", "MatMul", "Max", "Mul", "Range", "ReduceSum"),
    *("Relu", "Reshape", "Shape", "Squeeze", "Sub", "Unsqueeze", "Where", "FusedMatMul", "GatherBlockQuantized"),
    *("GroupQueryAttention", "MatMulNBits", "RotaryEmbedding", "Slice"),
}
READS_ON_HOST = {
    "GroupQueryAttention": {6},
    "Range": {0, 1, 2},
    **{name: {1} for name in ("ReduceSum", "Reshape", "Squeeze", "Unsqueeze")},
    "Slice": {1, 2, 3, 4},
}
MAKES_ON_HOST = {"Shape"}
SMALL = 100


class Placement:
    """Of one graph, whose nodes are in order."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        unknown = {node.op_type for node in graph.node} - KERNELS
        assert not unknown, f"no CUDA kernel is known of {unknown}"
        constants = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
        small = {name for name, size in constants.items() if size <= SMALL}
        self.given = {value.name for value in graph.input}
        self.on_host: set[str] = set()  # names of values that are made there
        readers: dict[bool, set[str]] = {True: set(), False: set()}
        made: set[str] = set()
        for node in graph.node:
            place = self._is_handed_back(node, small | self.given)
            for index, name in enumerate(node.input):
                readers[place or index in READS_ON_HOST.get(node.op_type, ())].add(name)
            made.update(node.output)
            if place or node.op_type in MAKES_ON_HOST:
                self.on_host.update(node.output)
        both = readers[True] & readers[False] & self.given
        wrong = {name for name in made if name in readers[name not in self.on_host]}
        self.copies = sorted(both | wrong)
        self.inputs_on_host = self.given & readers[True]

    def _is_handed_back(self, node: onnx.NodeProto, harmless: set[str]) -> bool:
        from_host = [name for name in node.input if name in self.on_host]
        wanted = READS_ON_HOST.get(node.op_type, set())
        asked = any(name in self.on_host and index in wanted for index, name in enumerate(node.input))
        return bool(from_host) and not asked and all(name in self.on_host or name in harmless for name in node.input)
