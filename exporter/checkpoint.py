"""A checkpoint directory: its spec, and its tensors read lazily, one at a time, with an adapter's change merged in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exporter.adapter import Adapter
from exporter.hub import locate, repository_name
from exporter.spec import NemotronSpec, read_spec
from exporter.tensor_files import Stamp, TensorInfo, read_checkpoint_headers
from exporter.tensor_slices import content, read_rows, read_slices, read_tensor, rows_at_once
from runtime.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. No tensor is in memory until `read` is called, and none stays."""

    path: Path
    spec: NemotronSpec
    tensors: Mapping[str, TensorInfo]
    adapter: Adapter | None = None
    _digests: dict[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, checkpoint: Path | str, adapter: Path | None = None, *, revision: str | None = None) -> Checkpoint:
        """Open a Hugging Face checkpoint and read the headers of its weights, safetensors or pickles.

        Args:
            checkpoint: a directory, or a hub id, whose snapshot is downloaded or found in the cache.
            adapter: a directory that `peft` saved a LoRA adapter to.
            revision: the branch, tag or commit of a hub id.

        Raises:
            UserError: neither a directory nor an id that is found, not a Nemotron, a missing, truncated or inconsistent
                shard, or an adapter that is not for this checkpoint or not of a known kind.
        """
        path = locate(checkpoint, revision)
        spec = read_spec(path)
        tensors = read_checkpoint_headers(path)
        return cls(path, spec, tensors, None if adapter is None else Adapter.open(adapter, tensors, tied=spec.tied))

    @property
    def name(self) -> str:
        """What bundles are called after: the directory's name, or that of the repository it is a snapshot of."""
        path = self.path.resolve()
        return repository_name(path) or path.name

    @property
    def parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def safetensors(self) -> bool:
        """Whether the weights come from safetensors files; from pickles otherwise."""
        return not any(info.pickled for info in self.tensors.values())

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that the adapter changes, which `read` returns in fp32."""
        return frozenset(self.adapter.changes) if self.adapter else frozenset()

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
        """Read one tensor, check it, and note its digest for the fingerprint.

        It has its stored dtype, but fp32 where the adapter changes it: rounding back to 16 bit would lose most of a
        small change.

        Raises:
            UserError: the file cannot be read, or the tensor holds NaN or infinity.
        """
        info = self.tensors[name]
        tensor = read_tensor(name, info)
        if name not in self._digests:
            digest = _begun(name, info)
            digest.update(content(tensor))
            self._digests[name] = digest.hexdigest()
        if self.adapter is None or name not in self.adapter.changes:
            return tensor
        merged, self._digests[f"{name} adapted"] = self.adapter.merge(name, tensor)
        return merged

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor, as `read` gives them; they do not count for the fingerprint."""
        return self.read(name)[rows] if name in self.adapted else read_rows(name, self.tensors[name], rows)

    def slices(self, name: str, *, wide: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """Read one tensor, as `read` does, some rows at a time: each slice with the index of its first row.

        All rows are those of a slice but for the last slice's, and their number is a multiple of 64; wide slices have
        more of them, for what is written as columns. What an adapter changes is merged in one piece.

        Raises:
            UserError: the file cannot be read or has changed, or a slice holds NaN or infinity.
        """
        if name in self.adapted:
            merged = self.read(name)
            rows = rows_at_once(tuple(merged.shape), merged.itemsize, wide=wide)
            yield from ((start, merged[start : start + rows]) for start in range(0, len(merged), rows))
            return
        info = self.tensors[name]
        digest = None if name in self._digests else _begun(name, info)
        for start, rows_of in read_slices(name, info, wide=wide):
            if digest is not None:
                digest.update(content(rows_of))
            yield start, rows_of
        if digest is not None:
            self._digests[name] = digest.hexdigest()

    def note(self, name: str, runs: Iterable[memoryview | None]) -> bool:
        """Note a tensor's digest for the fingerprint by its bytes, unless None is among them; whether it is noted."""
        digest = _begun(name, self.tensors[name])
        for run in runs:
            if run is None:
                return False
            digest.update(run)
        self._digests[name] = digest.hexdigest()
        return True

    def check_unchanged(self) -> None:
        """Check that every file is the one whose header was read.

        Raises:
            UserError: one is gone, or has changed.
        """
        for info in {info.file: info for info in self.tensors.values()}.values():
            try:
                info.check_unchanged(Stamp.of(info.file))
            except OSError as error:
                raise UserError(f"cannot read {info.file}: {error.strerror}; mend it and start again") from error

    def fingerprint(self) -> str:
        """sha256 over the sorted digests of (name, dtype, shape, bytes) of every tensor that was read.

        Where there is an adapter, the digests of its changes are among them.
        """
        return hashlib.sha256("\n".join(sorted(self._digests.values())).encode()).hexdigest()


def _begun(name: str, info: TensorInfo) -> Any:
    """The digest of a tensor, before its bytes."""
    return hashlib.sha256(f"{name} {info.dtype} {list(info.shape)} ".encode())
