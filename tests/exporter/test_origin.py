"""What is done to a weight on its way into the bundle: in fp32, once, and never to the wrong axis."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from exporter.origin import Origin, derive, is_weight, origin_of


def graph_with(name: str, shape: tuple[int, ...]) -> tuple[ir.Graph, ir.Value]:
    value = ir.val(name, dtype=ir.DataType.FLOAT, shape=shape)
    graph = ir.Graph([], [], nodes=[])
    graph.initializers.add(value)
    return graph, value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_one_is_added_in_fp32_not_in_the_checkpoints_sixteen_bits(dtype: torch.dtype) -> None:
    stored = (torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)
    expected = stored.double().numpy() + 1.0  # exact: 53 bits hold any 16-bit float and the one
    added = Origin("w", plus_one=True).apply(stored, torch.float32)
    assert added.dtype == torch.float32
    np.testing.assert_array_equal(added.numpy(), expected.astype(np.float32))
    assert np.abs((stored + 1).double().numpy() - expected).max() > 1e-4  # what adding first would have lost


def test_a_weight_without_flags_keeps_its_values() -> None:
    stored = torch.randn(3, 5).bfloat16()
    np.testing.assert_array_equal(
        Origin("w").apply(stored, torch.float32).numpy(), stored.double().numpy().astype(np.float32)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_in_sixteen_bits_is_rounded_once(dtype: torch.dtype) -> None:
    stored = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.1
    written = Origin("w", plus_one=True).apply(stored, dtype)
    assert written.dtype == dtype
    assert torch.equal(written, (stored.double() + 1).float().to(dtype))
    assert torch.equal(Origin("w").apply(stored, dtype), stored.to(dtype))


def test_a_transposed_weight_lies_in_memory_as_it_is_written() -> None:
    stored = torch.arange(15, dtype=torch.float32).reshape(3, 5)
    result = Origin("w", transposed=True).apply(stored, torch.float32)
    assert result.is_contiguous()
    assert result.numpy().tobytes() == np.ascontiguousarray(np.arange(15, dtype=np.float32).reshape(3, 5).T).tobytes()


def test_the_shape_asked_of_the_checkpoint_is_the_one_before_the_transposition() -> None:
    assert Origin("w").source_shape((3, 5)) == (3, 5)
    assert Origin("w", transposed=True).source_shape((3, 5)) == (5, 3)


def test_applying_a_recipe_does_not_change_the_tensor_it_is_given() -> None:
    stored = torch.zeros(4)
    Origin("w", plus_one=True).apply(stored, torch.float32)
    assert stored.tolist() == [0, 0, 0, 0]


def test_a_weight_no_pass_has_touched_is_the_checkpoints_tensor_of_its_name() -> None:
    _, value = graph_with("model.norm.weight", (4,))
    assert origin_of(value) == Origin("model.norm.weight")


def test_a_derived_weight_remembers_its_source_and_what_is_done_to_it() -> None:
    graph, value = graph_with("w", (3, 5))
    derived = derive(value, "transposed", transposed=True)
    assert origin_of(derived) == Origin("w", transposed=True)
    assert (derived.name, tuple(derived.shape), derived.dtype) == ("w.transposed", (5, 3), ir.DataType.FLOAT)
    assert graph.initializers["w.transposed"] is derived
    assert tuple(value.shape) == (3, 5)  # the source is as it was
    assert origin_of(value) == Origin("w")


def test_a_weight_that_two_nodes_use_is_written_once() -> None:
    graph, value = graph_with("w", (3, 5))
    assert derive(value, "transposed", transposed=True) is derive(value, "transposed", transposed=True)
    assert len(graph.initializers) == 2


def test_what_is_done_twice_adds_up() -> None:
    _, value = graph_with("w", (3, 5))
    once = derive(derive(value, "t", transposed=True), "plus_one", plus_one=True)
    assert origin_of(once) == Origin("w", plus_one=True, transposed=True)
    back = derive(once, "t", transposed=True)
    assert origin_of(back) == Origin("w", plus_one=True)
    assert tuple(back.shape) == (3, 5)


def test_only_initializers_without_a_value_are_weights() -> None:
    graph, value = graph_with("w", (3,))
    constant = ir.val("c", const_value=ir.tensor(np.zeros(3, np.float32), name="c"))
    graph.initializers.add(constant)
    assert is_weight(value)
    assert not is_weight(constant)
    assert not is_weight(ir.val("x", dtype=ir.DataType.FLOAT, shape=(3,)))
    assert not is_weight(None)
