"""A LoRA adapter that `peft` saved: what it changes of a checkpoint, merged in fp32 one tensor at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.adapter_config import AdapterConfig
from exporter.tensor_files import TensorInfo, read_header
from exporter.tensor_slices import all_finite, content, read_tensor
from runtime.errors import UserError

if TYPE_CHECKING:
    import torch

FILES = ("adapter_model.safetensors", "adapter_model.bin")

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])\.weight")
_EMBEDDING_FACTOR = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<which>[AB])")
_WHOLE = re.compile(r"(?P<module>.+?)(\.base_layer)?\.(?P<kind>weight|bias)")
_TIED = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor: puts another in its place, adds scaling·B@A, or both in this order.

    Attributes:
        whole: the adapter's name of the tensor that comes in place; None for none.
        factors: its names of A and B; A is [r, in] and B [out, r]. Keys are "A" and "B".
        embedding: whether the product is added transposed: an embedding's A is [r, vocab], B [hidden, r].
        scaling: what the product is multiplied with.
    """

    whole: str | None = None
    factors: Mapping[str, str] = field(default_factory=dict)
    embedding: bool = False
    scaling: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk: its tensors, and the changes by the names of the checkpoint's tensors."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    changes: Mapping[str, Change]

    @classmethod
    def open(cls, path: Path, base: Mapping[str, TensorInfo], *, tied: bool) -> Adapter:
        """Read an adapter's configuration and header, and find the place of each of its tensors.

        Args:
            path: the directory that `peft` saved it to.
            base: the tensors of the checkpoint that it is for.
            tied: whether the checkpoint's head is its embedding.

        Raises:
            UserError: not an adapter, one of another kind than LoRA or with features that change more than weights, or
                a tensor without a place in the checkpoint or of a wrong shape.
        """
        config = AdapterConfig.read(path)
        file = next((path / name for name in FILES if (path / name).is_file()), None)
        if file is None:
            raise UserError(f"{path} has neither {' nor '.join(FILES)}; save the adapter again")
        tensors = read_header(file)
        if not tensors:
            raise UserError(f"{file} holds no tensor, so it changes nothing; save the adapter again")
        changes = _changes(file, tensors, config)
        for name, change in changes.items():
            _check(name, change, file, tensors, base, config)
            if tied and name.endswith(_TIED):
                raise UserError(
                    f"{file} changes {name}, which this model shares between embedding and head, and peft trains one "
                    "of them; merge it with peft and save a checkpoint whose tie_word_embeddings is false"
                )
        _check_saved_modules(file, changes, config)
        return cls(path, tensors, changes)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.path.resolve().name

    def merge(self, name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, str]:
        """What the adapter makes of one of the checkpoint's tensors.

        Args:
            name: one of `changes`.
            tensor: the checkpoint's, of any float dtype.

        Returns:
            A new tensor of the same shape in fp32, and a sha256 over the change: its tensors as they are stored, and
            its scaling.

        Raises:
            UserError: a file cannot be read, or holds NaN or infinity, or the sum does.
        """
        import torch

        change = self.changes[name]
        digest = hashlib.sha256(f"{name} {change.scaling!r}".encode())
        if change.whole is not None:
            tensor = self._read(change.whole, digest)
        merged = tensor.to(torch.float32, copy=True)
        if change.factors:
            a, b = (self._read(change.factors[which], digest).float() for which in ("A", "B"))
            left, right = (a.t(), b.t()) if change.embedding else (b, a)
            merged.addmm_(left, right, alpha=change.scaling)
        if not all_finite(merged):
            raise UserError(f"{self.path} makes {name} leave the range of fp32; it is damaged, save it again")
        return merged, digest.hexdigest()

    def _read(self, name: str, digest: Any) -> torch.Tensor:
        info = self.tensors[name]
        tensor = read_tensor(name, info)
        digest.update(f" {name} {info.dtype} {list(info.shape)} ".encode())
        digest.update(content(tensor))
        return tensor


def _changes(file: Path, tensors: Mapping[str, TensorInfo], config: AdapterConfig) -> dict[str, Change]:
    """The changes that the names of an adapter's tensors stand for."""
    changes: dict[str, Change] = {}
    for name in sorted(tensors):
        inner = name.removeprefix(_PREFIX)
        if inner != name and (found := _FACTOR.fullmatch(inner) or _EMBEDDING_FACTOR.fullmatch(inner)):
            module, which = found["module"], found["which"]
            change = changes.get(f"{module}.weight", Change())
            changes[f"{module}.weight"] = replace(
                change,
                factors={**change.factors, which: name},
                embedding=found.re is _EMBEDDING_FACTOR,
                scaling=config.scaling(module),
            )
        elif inner != name and ".lora_" not in inner and (found := _WHOLE.fullmatch(inner)):
            target = f"{found['module']}.{found['kind']}"
            change = changes.get(target, Change())
            if change.whole is not None:
                raise UserError(f"{file} has both {change.whole} and {name} for {target}; save the adapter again")
            changes[target] = replace(change, whole=name)
        else:
            raise UserError(
                f"{file}: tensor {name} is not of a kind that can be merged; known: LoRA's A and B, and whole tensors"
            )
    return changes


def _check(
    name: str,
    change: Change,
    file: Path,
    tensors: Mapping[str, TensorInfo],
    base: Mapping[str, TensorInfo],
    config: AdapterConfig,
) -> None:
    """Check that a change has its place in the checkpoint, all its parts, and their shapes."""
    some = change.whole or next(iter(change.factors.values()))
    if name not in base:
        raise UserError(f"{file}: tensor {some} is for {name}, which the checkpoint has not; give the one it is for")
    shape = base[name].shape
    expected = {} if change.whole is None else {change.whole: shape}
    if change.factors:
        if missing := {"A", "B"} - change.factors.keys():
            raise UserError(f"{file}: tensor {some} has no lora_{missing.pop()} beside it; save the adapter again")
        if len(shape) != 2:
            raise UserError(f"{file}: tensor {some} is for {name} of shape {list(shape)}, which is no matrix; retrain")
        rank = config.rank(name.removesuffix(".weight"))
        rows, columns = shape[::-1] if change.embedding else shape
        expected |= {change.factors["A"]: (rank, columns), change.factors["B"]: (rows, rank)}
    for part, wanted in expected.items():
        if tensors[part].shape != wanted:
            raise UserError(
                f"{file}: tensor {part} has shape {list(tensors[part].shape)} where {list(wanted)} fits the checkpoint "
                "and the adapter's rank; give the checkpoint that it is for"
            )


def _check_saved_modules(file: Path, changes: Mapping[str, Change], config: AdapterConfig) -> None:
    whole = [name for name, change in changes.items() if change.whole is not None]
    for module in config.modules_to_save:
        if not any(f".{module}." in f".{name}" for name in whole):
            raise UserError(f"{file} has no tensor of {module}, which modules_to_save lists; save the adapter again")
