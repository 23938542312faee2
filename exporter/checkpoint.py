"""A checkpoint directory: its spec, and its tensors read lazily, one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.spec import NemotronSpec, read_spec
from runtime.errors import UserError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = ("F32", "F16", "BF16")  # safetensors' names of the dtypes a Nemotron checkpoint may hold


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, its safetensors dtype name and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. No tensor is in memory until `read` is called, and none stays."""

    path: Path
    spec: NemotronSpec
    tensors: Mapping[str, TensorInfo]
    _digests: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a Hugging Face checkpoint directory and read the headers of its safetensors files.

        Raises:
            UserError: not a directory, not a Nemotron, or a missing, truncated or inconsistent shard.
        """
        if not path.is_dir():
            raise UserError(f"{path} is not a directory; download the checkpoint first (`hf download …`)")
        spec = read_spec(path)
        return cls(path, spec, _read_headers(path))

    @property
    def name(self) -> str:
        """The directory's name, as bundles are called after it."""
        return self.path.resolve().name

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that a tensor exists with the shape that the configuration implies.

        Raises:
            UserError: it is missing or has another shape.
        """
        info = self.tensors.get(name)
        if info is None:
            raise UserError(f"{self.path}: tensor {name} is missing from the checkpoint; download it again")
        if info.shape != shape:
            raise UserError(
                f"{info.file}: tensor {name} has shape {list(info.shape)} where the configuration implies "
                f"{list(shape)}; config.json and weights are not of one model"
            )

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor in its stored dtype, check it, and note its digest for the fingerprint.

        Raises:
            UserError: the file cannot be read, or the tensor holds NaN or infinity.
        """
        import torch

        info = self.tensors[name]
        with _opened(info.file) as file:
            tensor: torch.Tensor = file.get_tensor(name)
        if not torch.isfinite(tensor).all():
            raise UserError(f"{info.file}: tensor {name} holds NaN or infinity; the checkpoint is damaged")
        header = f"{name} {info.dtype} {list(info.shape)} "
        digest = hashlib.sha256(header.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        self._digests[name] = digest.hexdigest()
        return tensor

    def fingerprint(self) -> str:
        """sha256 over the sorted digests of (name, dtype, shape, bytes) of every tensor that was read."""
        return hashlib.sha256("\n".join(sorted(self._digests.values())).encode()).hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); it is damaged or truncated") from error
    except RuntimeError as error:  # torch maps the whole file, which counts as memory
        raise UserError(
            f"{path} cannot be mapped into memory ({error}); free memory, or save smaller shards"
        ) from error


def _read_headers(path: Path) -> dict[str, TensorInfo]:
    shards = _shards(path)
    tensors: dict[str, TensorInfo] = {}
    for shard, expected in shards.items():
        if not shard.is_file():
            raise UserError(f"{shard} is missing: the checkpoint is incomplete; download it again")
        with _opened(shard) as file:
            names = set(file.keys())
            for name in sorted(expected - names):
                raise UserError(f"{shard}: tensor {name} is missing though {INDEX} lists it; download it again")
            for name in names:
                if name in tensors:
                    raise UserError(
                        f"{shard}: tensor {name} is also in {tensors[name].file.name}; delete one of the two"
                    )
                view = file.get_slice(name)
                tensors[name] = TensorInfo(shard, view.get_dtype(), tuple(view.get_shape()))
    for name, info in tensors.items():
        if info.dtype not in FLOATS:
            raise UserError(f"{info.file}: tensor {name} is {info.dtype}; convert it, known: {', '.join(FLOATS)}")
    return tensors


def _shards(path: Path) -> dict[Path, set[str]]:
    """Every safetensors file of the checkpoint, with the tensors that the index expects in it.

    Where there are both a single file and an index, the single file counts, as it does for transformers.
    """
    single, index = path / SINGLE, path / INDEX
    if single.is_file():
        return {single: set()}
    if not index.is_file():
        raise UserError(f"{path} has neither {SINGLE} nor {INDEX}; convert the checkpoint to safetensors")
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except OSError as error:
        raise UserError(f"cannot read {index}: {error.strerror}; change its permissions or copy it again") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a safetensors index ({error!r}); download it again") from error
    shards: dict[Path, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{index} names {file!r}, which is not a file of this directory; download it again")
        shards.setdefault(path / file, set()).add(name)
    return shards
