"""Files that torch.save wrote: their tensors, mapped into memory, without running what a pickle could."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import UserError

if TYPE_CHECKING:
    import torch

_ZIP = b"PK\x03\x04"  # how files of torch.save begin since torch 1.6; the ones before cannot be mapped
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
# What Python's and torch's unpicklers raise for bytes that are no pickle.
_NO_PICKLE = (EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, AssertionError, struct.error)
_REMEDY = "download it again, or convert the checkpoint to safetensors"


def is_pickle(file: Path) -> bool:
    """Whether a file is taken for torch's pickle, by its name."""
    return file.suffix == ".bin"


def dtype_name(tensor: torch.Tensor) -> str:
    """Its dtype as safetensors calls it, or as torch does where safetensors files may not hold it."""
    name = str(tensor.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def unpickled(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a file that torch.save wrote, mapped into memory and not read; no code of the pickle runs.

    Raises:
        UserError: it cannot be read or mapped, or holds anything but named tensors.
    """
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
