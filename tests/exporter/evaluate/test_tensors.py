"""What a bundle's file holds is what is evaluated, whichever part of it is read and wherever it lies."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from exporter.evaluate.tensors import WHOLE, read_tensor
from runtime.errors import UserError

DTYPES = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.FLOAT16: np.float16,
    ir.DataType.BFLOAT16: ml_dtypes.bfloat16,
    ir.DataType.UINT8: np.uint8,
}


def external(directory: Path, content: bytes, dtype: ir.DataType, shape: tuple[int, ...], at: int) -> ir.ExternalTensor:
    (directory / "data").write_bytes(b"z" * at + content)
    return ir.ExternalTensor("data", at, len(content), dtype, shape=ir.Shape(shape), name="x", base_dir=directory)


@pytest.mark.parametrize("at", [0, 7, 4096], ids=lambda at: f"at {at}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_parts_along_any_axis_are_those_of_the_whole(dtype: ir.DataType, at: int, tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(0, 99, (6, 10, 8)).astype(DTYPES[dtype])
    tensor = external(tmp_path, whole.tobytes(), dtype, whole.shape, at)
    for part in (WHOLE, slice(2, 5)):
        for axis in (0, 1, 2, -1):
            index = [WHOLE] * 3
            index[axis] = part
            np.testing.assert_array_equal(read_tensor(tensor, part, axis).float(), whole[tuple(index)].astype(float))


def test_int4_is_unpacked_whole_and_in_even_runs(tmp_path: Path) -> None:
    whole = np.random.default_rng(0).integers(-8, 8, (5, 12))
    pairs = whole.reshape(-1, 2) & 15
    tensor = external(
        tmp_path, (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8).tobytes(), ir.DataType.INT4, (5, 12), 3
    )
    np.testing.assert_array_equal(read_tensor(tensor), whole)
    np.testing.assert_array_equal(read_tensor(tensor, slice(2, 8), -1), whole[:, 2:8])
    with pytest.raises(ValueError, match="even run"):
        read_tensor(tensor, slice(1, 3), -1)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    whole = np.ones((6, 8), np.float32)
    tensor = external(tmp_path, whole.tobytes(), ir.DataType.FLOAT, whole.shape, 0)
    (tmp_path / "data").write_bytes(whole.tobytes()[:-4])
    with pytest.raises(UserError, match="data ends early"):
        read_tensor(tensor, slice(4, 8), -1)
