"""Files that appear under their name only when they are complete, and stay there.

Every file goes the same way: created exclusively as ``.NAME.PID.tmp`` beside its final name, its
whole length allocated (so a full disk is an error now and not at 95 %), written at offsets and
hashed, fsynced, renamed, and the directory fsynced. A crash at any point leaves the final name as
it was, and at most a ``.tmp`` that :mod:`loftq_cli.checkpoint.staging` removes.

Safetensors files are laid out as by the reference crate (``serialize`` in
``safetensors/src/tensor.rs``): tensors by falling alignment of their dtype, then by name; the
header padded with spaces to a multiple of 8. Their size is known before the first byte of data,
so a tensor may come in any order and in pieces, and none has to wait in memory for another.

All system calls are reached through this module's ``os``, where tests let any one of them fail.
Interrupted calls are repeated by Python itself (PEP 475).
"""

# os, not pathlib, which would hide what is called and keep tests from letting a call fail.
# ruff: noqa: PTH105, PTH108

from __future__ import annotations

import errno
import glob
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from loftq_cli.checkpoint.files import corrupt, opened, pieces_at, stamp_of
from loftq_cli.checkpoint.safetensors import tensor_bytes
from loftq_cli.errors import DoesNotFit, LoftqError, WriteFailed
from loftq_cli.formats import DTYPE_BITS

TEMPORARY_SUFFIX = ".tmp"
_ALIGNMENT = {dtype: position for position, dtype in enumerate(DTYPE_BITS)}
_NO_ALLOCATION = {errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor whose bytes are still to come."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class WrittenFile:
    """What is now on the disk, fsynced."""

    name: str
    bytes: int
    sha256: str


class NewFile:
    """One file on its way to its name; :attr:`written` is there once the ``with`` is left."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.written: WrittenFile
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
        self._hash = sha256()
        self._hashed = 0
        self._fd = -1

    def __enter__(self) -> NewFile:
        with disk_errors(self.path, self.size):
            self._fd = self._create()
            try:
                os.posix_fallocate(self._fd, 0, self.size)
            except BaseException as error:
                if not isinstance(error, OSError) or error.errno not in _NO_ALLOCATION:
                    self._discard()
                    raise
        return self

    def write(self, data: memoryview, offset: int) -> None:
        """Write at `offset`; what comes in file order is hashed on the way."""
        if offset == self._hashed:
            self._hash.update(data)
            self._hashed += len(data)
        with disk_errors(self.path, self.size):
            while data:
                # The kernel may write less than asked for, and never more than 2 GiB at once.
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._discard()
            return
        try:
            digest = self._digest()
            with disk_errors(self.path, self.size):
                os.fsync(self._fd)
                self._close()
                os.replace(self._temporary, self.path)
                fsync_path(self.path.parent)
        except BaseException:
            self._discard()
            raise
        self.written = WrittenFile(self.path.name, self.size, digest)

    def _create(self) -> int:
        # 0o666: the umask takes away what the user does not want to share.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(self._temporary, flags, 0o666)
        except FileExistsError:
            # The name has our process id, so it is what a dead process of the same id left.
            os.unlink(self._temporary)
            return os.open(self._temporary, flags, 0o666)

    def _digest(self) -> str:
        """The file's hash; what was not hashed in order is read again."""
        for piece in pieces_at(self._fd, self._hashed, self.size, self._temporary):
            self._hash.update(piece)
        return self._hash.hexdigest()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _discard(self) -> None:
        with suppress(OSError):
            self._close()
        with suppress(OSError):
            os.unlink(self._temporary)


def write_safetensors(
    path: Path,
    plan: Sequence[PlannedTensor],
    produce: Iterable[tuple[str, memoryview | bytes]],
    metadata: Mapping[str, str] | None = None,
) -> WrittenFile:
    """Write the planned tensors as `produce` hands them over, by name and in any order.

    A tensor may come in several pieces, which follow each other. A tensor that is not planned,
    has too many bytes or has too few is a mistake of the caller: ValueError.
    """
    header, starts = _layout(plan, {"format": "pt"} if metadata is None else metadata)
    ends = {tensor.name: starts[tensor.name] + tensor.nbytes for tensor in plan}
    position = dict(starts)
    with NewFile(path, max(ends.values(), default=len(header))) as file:
        file.write(memoryview(header), 0)
        for name, data in produce:
            view = memoryview(data)
            if name not in ends or position[name] + view.nbytes > ends[name]:
                raise ValueError(f"{path.name}: bytes of {name} that were not planned")
            if view.nbytes:  # a view without elements cannot be cast
                file.write(view.cast("B"), position[name])
                position[name] += view.nbytes
        short = [name for name, end in ends.items() if position[name] != end]
        if short:
            raise ValueError(f"{path.name}: {len(short)} tensors incomplete, {short[0]} first")
    return file.written


def write_bytes_atomically(path: Path, data: bytes) -> WrittenFile:
    """Write a small file."""
    with NewFile(path, len(data)) as file:
        file.write(memoryview(data), 0)
    return file.written


def copy_file(source: Path, path: Path) -> WrittenFile:
    """Copy a file's contents in pieces. Mode and times are the new file's own."""
    with opened(source) as (fd, stamp), NewFile(path, stamp[0]) as file:
        offset = 0
        for piece in pieces_at(fd, 0, stamp[0], source):
            file.write(piece, offset)
            offset += len(piece)
        if stamp_of(os.fstat(fd)) != stamp:
            raise corrupt(source, "it changed while it was copied", "run again")
    return file.written


def hash_file(path: Path) -> WrittenFile:
    """What is under this name now; CorruptCheckpoint if it cannot be read."""
    digest = sha256()
    with opened(path) as (fd, (size, _)):
        for piece in pieces_at(fd, 0, size, path):
            digest.update(piece)
    return WrittenFile(path.name, size, digest.hexdigest())


def fsync_path(path: Path) -> None:
    """Make a file's bytes, or the names in a directory, last through a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot, and says so
            raise
    finally:
        os.close(fd)


@contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Tell an OSError of the disk as what it means: DoesNotFit, or WriteFailed."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path, needed) from error


def disk_error(error: OSError, path: Path, needed: int) -> LoftqError:
    """`needed`: how many bytes were to be written when it happened."""
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        return DoesNotFit(
            f"no room to write {path}",
            cause=f"{reason}: {_shortage(needed, free_bytes(path))}",
            hint="make room and run the same command again: finished files are kept",
        )
    if error.errno == errno.EFBIG:
        return DoesNotFit(
            f"no room to write {path}",
            cause=f"{reason}: {_size(needed)} is more than a file may have here",
            hint="raise `ulimit -f`, or choose a file system that allows large files",
        )
    hints = {
        errno.EACCES: "choose another --output, or change the directory's permissions",
        errno.EPERM: "choose another --output, or change the directory's permissions",
        errno.ENOTDIR: "choose another --output: part of this path is a file",
        errno.ENAMETOOLONG: "choose a shorter --output",
        errno.ENOENT: "choose another --output: its directory cannot be made",
        errno.EROFS: "choose an --output on a file system that can be written",
        errno.EIO: "check the disk (`dmesg`), then run the same command again",
    }
    return WriteFailed(
        f"{path} could not be written",
        cause=reason,
        hint=hints.get(error.errno or 0, "run the same command again: finished files are kept"),
    )


def discard_unfinished(path: Path) -> None:
    """Removes what a process that ended in the middle of writing `path` left beside it."""
    with disk_errors(path):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY_SUFFIX}"):
            left.unlink(missing_ok=True)


def require_free_space(path: Path, needed: int) -> None:
    """DoesNotFit if the file system that `path` is or will be on has less than this free."""
    free = free_bytes(path)
    if needed > free:
        raise DoesNotFit(
            f"no room to write {path}",
            cause=_shortage(needed, free),
            hint="make room, or choose an --output on a larger disk",
        )


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write where `path` is, or where it would be made."""
    while True:
        try:
            status = os.statvfs(path)
        except OSError:
            if path == path.parent:
                return 0
            path = path.parent
        else:
            return status.f_bavail * status.f_frsize


def _layout(
    plan: Sequence[PlannedTensor], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header, and where in the file each tensor starts."""
    ordered = sorted(plan, key=lambda tensor: (-_ALIGNMENT[tensor.dtype], tensor.name))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    starts = {}
    for tensor in ordered:
        starts[tensor.name] = offset
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    if len(entries) != len(plan) + 1:
        raise ValueError("two planned tensors have the same name, or one is called __metadata__")
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def _shortage(needed: int, free: int) -> str:
    missing = f", {_size(needed - free)} missing" if needed > free else ""
    return f"{_size(needed)} needed, {_size(free)} free{missing}"


def _size(count: int) -> str:
    """1536 -> '1.5 KiB'"""
    if count < 1024:
        return f"{count} bytes"
    size = count / 1024
    for unit in ("KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
