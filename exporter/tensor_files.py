"""Files that hold named tensors, safetensors and torch's pickles: their headers, and one tensor at a time."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import UserError

if TYPE_CHECKING:
    import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
LAYOUTS = ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX))  # a single file counts before an index, as for transformers
FLOATS = ("F32", "F16", "BF16")  # safetensors' names of the dtypes a Nemotron checkpoint may hold

_ZIP = b"PK\x03\x04"  # how files of torch.save begin since torch 1.6; the ones before cannot be mapped
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
# What Python's and torch's unpicklers raise for bytes that are no pickle.
_NO_PICKLE = (EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, struct.error)
_REMEDY = "download it again, or convert the checkpoint to safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, its safetensors dtype name and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def pickled(self) -> bool:
        """Whether the file is torch's pickle and not safetensors."""
        return is_pickle(self.file)


def is_pickle(file: Path) -> bool:
    """Whether a file is taken for torch's pickle, by its name."""
    return file.suffix == ".bin"


def read_checkpoint_headers(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint directory; safetensors count where there are pickles too.

    Raises:
        UserError: no weights, a missing, damaged or inconsistent shard, or a tensor that is not fp32, fp16 or bf16.
    """
    tensors: dict[str, TensorInfo] = {}
    index, shards = _shards(path)
    for shard, expected in shards.items():
        found = read_header(shard)
        for name in sorted(expected - found.keys()):
            raise UserError(f"{shard}: tensor {name} is missing though {index} lists it; download it again")
        for name in found:
            if name in tensors:
                raise UserError(f"{shard}: tensor {name} is also in {tensors[name].file.name}; delete one of the two")
        tensors |= found
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a file's tensors; none is in memory afterwards.

    Raises:
        UserError: the file is missing or damaged, a pickle holds anything but tensors, or a tensor is not fp32, fp16
            or bf16.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: the checkpoint is incomplete; download it again")
    if is_pickle(file):
        tensors = {
            name: TensorInfo(file, _dtype_name(tensor), tuple(tensor.shape))
            for name, tensor in _unpickled(file).items()
        }
    else:
        with _opened(file, "numpy") as opened:  # which loads no torch
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            tensors = {
                name: TensorInfo(file, view.get_dtype(), tuple(view.get_shape())) for name, view in slices.items()
            }
    for name, info in tensors.items():
        if info.dtype not in FLOATS:
            raise UserError(f"{file}: tensor {name} is {info.dtype}; convert it, known: {', '.join(FLOATS)}")
    return tensors


def read_tensor(name: str, info: TensorInfo) -> torch.Tensor:
    """One tensor in its stored dtype and shape, contiguous; its file is mapped, so no other takes memory.

    Raises:
        UserError: the file cannot be read, or the tensor holds NaN or infinity.
    """
    import torch

    if info.pickled:
        tensors = _unpickled(info.file)
        if name not in tensors:
            raise UserError(f"{info.file}: tensor {name} has gone since the file was opened; start again")
        tensor = tensors[name].detach()
    else:
        with _opened(info.file, "pt") as file:
            tensor = file.get_tensor(name)
    if not torch.isfinite(tensor).all():
        raise UserError(f"{info.file}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
    return tensor.contiguous()


def content(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    import torch

    return memoryview(tensor.view(-1).view(torch.uint8).numpy().data)


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); it is damaged or truncated") from error
    except RuntimeError as error:  # torch maps the whole file, which counts as memory
        raise UserError(
            f"{path} cannot be mapped into memory ({error}); free memory, or save smaller shards"
        ) from error


def _unpickled(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a file that torch.save wrote, mapped into memory and not read; no code of the pickle runs."""
    import torch

    try:
        with path.open("rb") as file:
            magic = file.read(len(_ZIP))
        if magic != _ZIP:
            raise UserError(f"{path} is not in the zip format of torch.save, which alone can be mapped; {_REMEDY}")
        value = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, or is damaged, and unpickling it could run code; convert the checkpoint "
            "to safetensors where you trust it"
        ) from error
    except (OSError, RuntimeError, *_NO_PICKLE) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path} cannot be read as a pickle of tensors ({reason}); {_REMEDY}") from error
    return _checked(value, path)


def _checked(value: Any, path: Path) -> Mapping[str, torch.Tensor]:
    import torch

    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not named tensors; {_REMEDY}")
    for name, tensor in value.items():
        plain = (
            isinstance(name, str)
            and isinstance(tensor, torch.Tensor)
            and tensor.layout is torch.strided
            and tensor.device.type == "cpu"  # a tensor saved from the meta device has no content
        )
        if not plain:
            raise UserError(f"{path}: {name!r} is no tensor with content but a {type(tensor).__name__}; {_REMEDY}")
    return value


def _dtype_name(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _shards(path: Path) -> tuple[str, dict[Path, set[str]]]:
    """The index's name, and every file of the checkpoint with the tensors that the index expects in it."""
    for single, index in LAYOUTS:
        if (path / single).is_file():
            return index, {path / single: set()}
        if (path / index).is_file():
            return index, _indexed(path, path / index)
    known = ", ".join(name for layout in LAYOUTS for name in layout)
    raise UserError(f"{path} has no weights, which should be in one of {known}; download the checkpoint again")


def _indexed(path: Path, index: Path) -> dict[Path, set[str]]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except OSError as error:
        raise UserError(f"cannot read {index}: {error.strerror}; change its permissions or copy it again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not an index of shards ({error!r}); download it again") from error
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index} names {file!r}, which is not a file of this directory; download it again")
        shards.setdefault(path / file, set()).add(name)
    return shards
