"""Initializers that are a checkpoint's tensors as they stand: the bundle has the checkpoint's own file, not a copy."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import onnx_ir as ir

from exporter.checkpoint import Checkpoint
from exporter.file_digest import FileDigest
from exporter.origin import Origin, is_weight, origin_of, part_of
from exporter.parameters import weight_source
from exporter.scaling import Scaling
from exporter.tensor_files import TensorInfo
from runtime.errors import UserError
from runtime.manifest import FileRecord

_CLONE = 0x40049409  # FICLONE of linux/fs.h: one content, copied when either file is written
_DTYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}
# Of another file system, of one without links, of a user who may not, of a file with as many as it can have.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def linkable(values: Iterable[ir.Value], checkpoint: Checkpoint, scaling: Scaling) -> dict[ir.Value, str]:
    """The initializers that hold, byte for byte, one of the checkpoint's tensors, with its name."""
    found = {}
    for value in values:
        if not is_weight(value) or part_of(value) is not None:
            continue
        origin = origin_of(value)
        source = weight_source(origin.tensor, checkpoint)
        info = checkpoint.tensors.get(source)
        if (
            info is not None
            and not info.pickled
            and _DTYPES[info.dtype] == value.dtype
            and origin == Origin(origin.tensor)
            and source not in checkpoint.adapted
            and not scaling.changes(origin.tensor)
        ):
            assert value.shape is not None
            checkpoint.require(source, tuple(int(dim) for dim in value.shape.numpy()))
            found[value] = source
    return found


def link_files(names: Iterable[str], checkpoint: Checkpoint, directory: Path) -> None:
    """Put the files of these tensors into a directory, under their names, without copying them.

    Raises:
        UserError: the file system of the directory is another, or cannot.
        OSError: the directory cannot be written.
    """
    for file in sorted({checkpoint.tensors[name].file for name in names}):
        _link(file.resolve(), directory / file.name)  # in the hub's cache, a name is a symbolic link


def read_linked(names: Iterable[str], checkpoint: Checkpoint, progress: Callable[[int], None]) -> dict[str, FileRecord]:
    """Check and hash tensors whose files are linked, and the files, each read from front to back.

    Args:
        names: of the tensors.
        checkpoint: whose they are.
        progress: called with the bytes of each slice that has been read.

    Returns:
        The files' sizes and hashes by their names.

    Raises:
        UserError: a file cannot be read or changes, or a tensor holds NaN or infinity.
    """
    files: dict[Path, dict[str, TensorInfo]] = {}
    for name in names:
        info = checkpoint.tensors[name]
        files.setdefault(info.file, {})[name] = info
    records = {}
    for path, tensors in files.items():
        with path.open("rb", buffering=0) as file, FileDigest(file.fileno(), path) as digest:
            size = os.fstat(file.fileno()).st_size
            digest.to(size)  # by another thread, at the pace of this one: the file leaves the disk once
            for name in sorted(tensors, key=lambda name: tensors[name].offset):
                for _, rows in checkpoint.slices(name):
                    progress(rows.nbytes)
            records[path.name] = digest.record()
    return records


def external(value: ir.Value, name: str, checkpoint: Checkpoint, directory: Path) -> ir.ExternalTensor:
    """An initializer as a part of a linked file."""
    info = checkpoint.tensors[name]
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    return ir.ExternalTensor(
        info.file.name, info.offset, info.nbytes, value.dtype, shape=value.shape, name=value.name, base_dir=directory
    )


def _link(source: Path, target: Path) -> None:
    if _cloned(source, target):
        return
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        raise UserError(
            f"{source} cannot be linked into {target.parent.parent} ({error.strerror}); export to a place on the "
            "checkpoint's file system, or with --weights copy"
        ) from error


def _cloned(source: Path, target: Path) -> bool:
    """Whether the file system made a file that shares the other's content until one of them is written."""
    try:
        from fcntl import ioctl
    except ImportError:
        return False
    with source.open("rb") as file, target.open("xb") as clone, suppress(OSError):
        ioctl(clone.fileno(), _CLONE, file.fileno())
        return True
    target.unlink()
    return False
