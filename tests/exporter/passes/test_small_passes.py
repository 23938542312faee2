"""The passes that change one node at a time, on graphs written by hand."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from exporter.origin import Origin, derive, origin_of
from exporter.passes.base import PassFailed
from exporter.passes.fold_weight_transposes import FoldWeightTransposes
from exporter.passes.multiply_as_stored import MultiplyAsStored
from exporter.passes.requested_logits import RequestedLogits
from exporter.passes.square_relu import SquareRelu

FLOAT = ir.DataType.FLOAT


def graph(inputs: list[ir.Value], outputs: list[ir.Value], nodes: Any, weights: Any = ()) -> ir.Model:
    return ir.Model(
        ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 23}, name="g"), ir_version=11
    )


def power_of_relu(exponent: float, op: str = "Relu") -> ir.Model:
    x = ir.val("x", dtype=FLOAT, shape=["batch", 8])
    constant = ir.val("exponent", const_value=ir.tensor(exponent, name="exponent"))
    tape = ir.tape.Tape()
    y = tape.op("Pow", [tape.op(op, [x]), constant])
    y.name, y.dtype, y.shape = "y", FLOAT, x.shape
    weight = ir.Value(name="model.layers.0.weight", type=ir.TensorType(FLOAT), shape=ir.Shape([1]))  # of one layer
    return graph([x], [y], tape.nodes, [constant, weight])


def test_a_squared_relu_becomes_a_product_of_the_same_name() -> None:
    model = power_of_relu(2.0)
    assert SquareRelu("relu2")(model).count == 1
    assert [node.op_type for node in model.graph] == ["Relu", "Mul"]
    assert model.graph.outputs[0].name == "y"
    assert SquareRelu("relu2")(model).count == 0


def test_another_activation_has_no_squared_relu() -> None:
    with pytest.raises(PassFailed, match="found 1 squared Relu where 0 are expected"):
        SquareRelu("relu")(power_of_relu(2.0))


@pytest.mark.parametrize("model", [power_of_relu(3.0), power_of_relu(2.0, "Sigmoid")], ids=["cube", "not a relu"])
def test_what_is_not_a_squared_relu_stops_the_export(model: ir.Model) -> None:
    with pytest.raises(PassFailed, match="found 0 squared Relu where 1 are expected"):
        SquareRelu("relu2")(model)


def test_a_weight_that_is_linked_is_multiplied_as_it_is_stored_and_computed_matrices_as_they_are() -> None:
    x = ir.val("x", dtype=FLOAT, shape=["batch", 4])
    weight = ir.Value(name="w", type=ir.TensorType(FLOAT), shape=ir.Shape([6, 4]))
    tape = ir.tape.Tape()
    y = tape.op("MatMul", [x, tape.op("Transpose", [weight], {"perm": [1, 0]})])
    z = tape.op("MatMul", [y, tape.op("Transpose", [y], {"perm": [1, 0]})])
    z.name = "z"
    model = graph([x], [z], tape.nodes)
    model.graph.initializers.add(weight)

    assert MultiplyAsStored()(model).count == 1
    assert [node.op_type for node in model.graph] == ["FusedMatMul", "Transpose", "MatMul"]
    fused = model.graph.node(0)
    assert fused.inputs[1] is weight
    assert (fused.domain, model.opset_imports["com.microsoft"]) == ("com.microsoft", 1)
    assert fused.attributes["transB"].as_int() == 1
    assert MultiplyAsStored()(model).count == 0


def test_a_transposed_weight_is_stored_transposed_and_anything_else_stays() -> None:
    x = ir.val("x", dtype=FLOAT, shape=["batch", 4])
    weight = ir.Value(name="w", type=ir.TensorType(FLOAT), shape=ir.Shape([6, 4]))
    tape = ir.tape.Tape()
    y = tape.op("MatMul", [x, tape.op("Transpose", [weight], {"perm": [1, 0]})])
    z = tape.op("Transpose", [y], {"perm": [1, 0]})
    z.name = "z"
    model = graph([x], [z], tape.nodes)
    model.graph.initializers.add(weight)

    assert FoldWeightTransposes()(model).count == 1
    matmul = model.graph.node(0)
    assert origin_of(matmul.inputs[1]) == Origin("w", transposed=True)
    assert tuple(matmul.inputs[1].shape) == (4, 6)
    assert [node.op_type for node in model.graph] == ["MatMul", "Transpose"]


def test_transposing_twice_is_the_weight_as_it_is_stored() -> None:
    x = ir.val("x", dtype=FLOAT, shape=[4, 4])
    model = graph([x], [x], [])
    weight = ir.Value(name="w", type=ir.TensorType(FLOAT), shape=ir.Shape([6, 4]))
    model.graph.initializers.add(weight)
    twice = derive(derive(weight, "t", transposed=True), "t", transposed=True)
    assert origin_of(twice) == Origin("w")
    assert tuple(twice.shape) == (6, 4)


def test_a_model_without_a_final_norm_cannot_keep_requested_logits_only() -> None:
    ids = ir.val("input_ids", dtype=ir.DataType.INT64, shape=["batch", "sequence"])
    x = ir.val("x", dtype=FLOAT, shape=["batch", "sequence", 4])
    weight = ir.val("w", dtype=FLOAT, shape=[4, 9])
    tape = ir.tape.Tape()
    logits = tape.op("MatMul", [x, weight])
    logits.name, logits.shape = "logits", ir.Shape(["batch", "sequence", 9])
    with pytest.raises(PassFailed, match="no product with the final LayerNormalization"):
        RequestedLogits()(graph([ids, x, weight], [logits], tape.nodes))
