"""Graphs and TensorRT networks, run operation by operation: every edge is rounded to its declared dtype.

ONNX Runtime's CPU kernels run a 16-bit graph in fp32 between two casts, and TensorRT needs a GPU. Here each operation
computes in fp32 and its result is rounded to the dtype that the graph or the network declares for it, so what overflows
on the device overflows here.
"""
