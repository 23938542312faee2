"""Whatever slices a tensor is read in, the bundle's data file is the same, and threads end however writing does."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pickles
import pytest
import torch
from checkpoints import write_checkpoint
from refusals import assert_tells

from exporter import tensor_slices
from exporter.calibrated import Calibrated
from exporter.checkpoint import Checkpoint
from exporter.data_file import DataFile
from exporter.origin import derive, derive_parts
from exporter.rounding import SCALES, BlockInt4, BlockNBits, ChannelFp8, Rounding
from exporter.scaling import Scaling
from exporter.weights import write_embeddings, write_weights
from runtime.bundle import sha256_of
from runtime.errors import UserError

NORM, UP, EMBEDDING, HEAD = (
    *("model.norm.weight", "model.layers.0.mlp.up_proj.weight"),
    *("model.embed_tokens.weight", "lm_head.weight"),
)
DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
ROUNDINGS = (BlockNBits(4, 32, False), BlockNBits(8, 32, True), BlockInt4(32), ChannelFp8())


def one_of_each(checkpoint: Checkpoint, dtype: ir.DataType) -> ir.Model:
    """A graph of a norm, of two matrices as they are and transposed, and of one of them in every rounding."""
    graph = ir.Graph([], [], nodes=[], name="g", opset_imports={"": 21})
    for name in (NORM, UP, EMBEDDING):
        graph.initializers.add(ir.val(name, dtype=dtype, shape=checkpoint.tensors[name].shape))
    derive(graph.initializers[NORM], "plus_one", plus_one=True)
    for name in (UP, EMBEDDING):  # tied models read the embedding both ways
        derive(graph.initializers[name], "transposed", transposed=True)
    for rounding, name in product(ROUNDINGS, (UP, EMBEDDING)):
        copy = derive(graph.initializers[name], f"{rounding.precision}.{type(rounding).__name__}")
        derive_parts(copy, rounding, dtype)
        del graph.initializers[str(copy.name)]
    return ir.Model(graph, ir_version=10)


def expected(value: ir.Value, source: torch.Tensor, scale: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    """What an initializer should hold, from the whole tensor."""
    name, _, last = str(value.name).rpartition(".")
    dtype: torch.dtype = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}.get(
        value.dtype, torch.bfloat16
    )
    rounding = next((r for r in ROUNDINGS if name.endswith(f".{r.precision}.{type(r).__name__}")), None)
    if rounding is not None:
        array = rounding.apply(scale(source))[last]
        return (torch.from_numpy(array).to(dtype).view(torch.uint8).numpy() if last == SCALES else array).tobytes()
    tensor = scale(source.float() + 1 if last == "plus_one" else source)
    tensor = (tensor.T if last == "transposed" else tensor).to(dtype).contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def slices_of(monkeypatch: pytest.MonkeyPatch, size: int, even: int = 64) -> None:
    """Slices, wide ones too, of about so many bytes, and of a multiple of so many rows."""
    monkeypatch.setattr(tensor_slices, "SLICE_BYTES", size)
    monkeypatch.setattr(tensor_slices, "WIDE_BYTES", size)
    monkeypatch.setattr(tensor_slices, "EVEN", even)


@pytest.fixture(params=["fp32", "bf16", "bf16 pickled"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    dtype = torch.float32 if request.param == "fp32" else torch.bfloat16
    path = write_checkpoint(tmp_path / "checkpoint", dtype=dtype)
    if request.param.endswith("pickled"):
        pickles.repickle(path)
    return path


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_slices_of_any_size_give_what_whole_tensors_do(checkpoint, precision, scaled, tmp_path, monkeypatch) -> None:
    opened = Checkpoint.open(checkpoint)
    factors = {
        "model.layers.0.mlp.up_proj": torch.arange(1, 65) / 8,
        "model.layers.0.mlp.down_proj": torch.ones(96) * 4,
    }
    scaling = Scaling(opened.spec, factors if scaled else {})
    found = set()
    for index, (size, even) in enumerate([(1, 2), (1, 64), (1 << 24, 64)]):
        slices_of(monkeypatch, size, even)
        model, path = one_of_each(opened, DTYPES[precision]), tmp_path / f"data-{index}"
        opened = Checkpoint.open(checkpoint)
        records = write_weights(model, opened, path, Calibrated(scaling))
        assert records == {path.name: records[path.name]}
        assert (records[path.name].sha256, records[path.name].bytes) == (sha256_of(path), path.stat().st_size)
        found.add((records[path.name].sha256, opened.fingerprint()))
        content = path.read_bytes()
        for value in model.graph.initializers.values():
            name = next(known for known in (NORM, UP, EMBEDDING) if str(value.name).startswith(known))
            tensor = value.const_value
            assert isinstance(tensor, ir.ExternalTensor)
            assert tensor.offset is not None
            assert tensor.length is not None
            whole = expected(value, opened.read(name), lambda t, name=name: scaling.apply(name, t))
            assert content[tensor.offset : tensor.offset + tensor.length] == whole, value.name
    assert len(found) == 1


@pytest.mark.parametrize("size", [1, 1 << 24])
def test_the_table_of_embeddings_is_as_numpy_saves_it(checkpoint: Path, tmp_path: Path, monkeypatch, size: int) -> None:
    slices_of(monkeypatch, size)
    opened = Checkpoint.open(checkpoint)
    record = write_embeddings(opened, tmp_path / "ours.npy")
    np.save(tmp_path / "theirs.npy", opened.read(EMBEDDING).float().numpy())
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "theirs.npy").read_bytes()
    assert record.sha256 == sha256_of(tmp_path / "theirs.npy")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    for count in (1, 7, 64, 1000):
        assert tensor_slices.all_finite(torch.ones(count, dtype=dtype))
        for place in {0, count // 2, count - 1}:
            tensor = torch.ones(count, dtype=dtype)
            tensor[place] = value
            assert not tensor_slices.all_finite(tensor)


# What goes wrong on the way


def threads_left() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("weights", "hash"))]


def sliced(monkeypatch: pytest.MonkeyPatch, after: int, then: Callable[[], None]) -> None:
    """Slices of two rows; something happens after some of them."""
    slices_of(monkeypatch, 1, even=2)
    slices = Checkpoint.slices

    def watched(self: Checkpoint, name: str, **how: bool) -> Iterator[tuple[int, torch.Tensor]]:
        for count, found in enumerate(slices(self, name, **how)):
            yield found
            if name == UP and count == after:
                then()

    monkeypatch.setattr(Checkpoint, "slices", watched)


def refused(checkpoint: Path, tmp_path: Path) -> UserError:
    opened = Checkpoint.open(checkpoint)
    with pytest.raises(UserError) as found:
        write_weights(one_of_each(opened, ir.DataType.FLOAT), opened, tmp_path / "data")
    assert threads_left() == []
    return found.value


def appended(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def touched(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def replaced(file: Path) -> None:
    content, times = file.read_bytes(), file.stat()
    file.rename(file.with_name("old"))
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def deleted(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("after", [0, 47])  # of 48 slices
@pytest.mark.parametrize("change", [appended, cut, touched, replaced, deleted], ids=lambda change: change.__name__)
def test_a_file_that_changes_while_it_is_read_is_refused(checkpoint, tmp_path, monkeypatch, change, after) -> None:
    file = next(path for path in checkpoint.iterdir() if path.suffix in {".safetensors", ".bin"})
    sliced(monkeypatch, after, lambda: change(file))
    assert_tells(refused(checkpoint, tmp_path), file, "start again")


def test_a_read_that_ends_early_is_refused(small_copy: Path, tmp_path: Path, monkeypatch) -> None:
    """As where a file on a network is cut, and its size is not known here yet."""
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, at: 0)
    assert_tells(refused(small_copy, tmp_path), small_copy / "model.safetensors", "truncated")


def test_what_a_thread_raises_is_raised_and_the_threads_end(small_copy: Path, tmp_path: Path, monkeypatch) -> None:
    def full(self: DataFile, at: int, data: memoryview) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(DataFile, "_write", full)
    opened = Checkpoint.open(small_copy)
    with pytest.raises(OSError, match="No space"):
        write_weights(one_of_each(opened, ir.DataType.FLOAT), opened, tmp_path / "data")
    assert threads_left() == []


def test_threads_end_when_the_user_interrupts(small_copy: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    sliced(monkeypatch, 20, interrupt)
    threads = torch.get_num_threads()
    opened = Checkpoint.open(small_copy)
    with pytest.raises(KeyboardInterrupt):
        write_weights(one_of_each(opened, ir.DataType.FLOAT), opened, tmp_path / "data")
    assert threads_left() == []
    assert torch.get_num_threads() == threads


def test_what_leaves_the_range_of_the_dtype_is_named(tmp_path: Path, monkeypatch) -> None:
    path = write_checkpoint(tmp_path / "checkpoint")
    opened = Checkpoint.open(path)
    scaling = Scaling(opened.spec, {"model.layers.0.mlp.down_proj": torch.full((96,), 1e-12)})
    slices_of(monkeypatch, 1)
    with pytest.raises(UserError) as found:
        write_weights(one_of_each(opened, ir.DataType.FLOAT16), opened, tmp_path / "data", Calibrated(scaling))
    assert_tells(found.value, UP, "leaves the range of float16")


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
def test_what_calibration_has_rounded_is_written_as_it_is(small_copy, tmp_path, rounding: Rounding) -> None:
    opened = Checkpoint.open(small_copy)
    parts: dict[str, Any] = rounding.apply(torch.randn(opened.tensors[UP].shape))
    np.savez(tmp_path / "0.npz", **parts)
    graph = ir.Graph([], [], nodes=[], name="g", opset_imports={"": 21})
    value = ir.val(UP, dtype=ir.DataType.FLOAT, shape=opened.tensors[UP].shape)
    graph.initializers.add(value)
    derive_parts(value, rounding, ir.DataType.FLOAT)
    del graph.initializers[UP]
    calibrated = replace(Calibrated(Scaling(opened.spec)), rounded={UP: tmp_path / "0.npz"})
    write_weights(ir.Model(graph, ir_version=10), opened, tmp_path / "data", calibrated)
    content = (tmp_path / "data").read_bytes()
    for name, array in parts.items():
        tensor = graph.initializers[f"{UP}.{name}"].const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert content[tensor.offset or 0 :][: tensor.length] == array.tobytes()
