"""The bytes of files, by position: local ones here, those of a hub in `models/hub_files.py`.

Local files are read with positioned reads, not through a mapping: a file that is truncated while it
is mapped kills the process with SIGBUS, here it is an error. A real EINTR never surfaces, since
Python repeats the interrupted call itself (PEP 475).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from loftq_cli.errors import CorruptCheckpoint

PIECE_BYTES = 8 << 20

DOWNLOAD_AGAIN = "download the file again; `hf download` resumes and checks what it fetches"

# `pieces(start, end)`: the bytes between two positions in order, a few megabytes at a time. Each
# piece has whole values of any dtype, and is good until the next is asked for.
Pieces: TypeAlias = Callable[[int, int], Iterator[memoryview]]


class ByteSource(Protocol):
    """Where the bytes of a weight file are: plain data that any process can open."""

    def opened(self) -> AbstractContextManager[Pieces]:
        """`with source.opened() as pieces:`; several threads may read at once.

        Raises, then and later:
            CorruptCheckpoint: the file is not what it was when its header was read, or ends early.
            LoftqError: it cannot be read.
        """
        ...


@dataclass(frozen=True)
class LocalFile:
    """A file on a disk, by its (size, mtime in ns) when its header was read."""

    path: Path
    stamp: tuple[int, int]

    @contextmanager
    def opened(self) -> Iterator[Pieces]:
        with opened(self.path) as (fd, before):
            # Looked at before and after: a file replaced half-way through is caught by the second.
            self._require(before)

            def pieces(start: int, end: int) -> Iterator[memoryview]:
                for piece in pieces_at(fd, start, end, self.path):
                    self._require(stamp_of(os.fstat(fd)))
                    yield piece

            yield pieces

    def _require(self, stamp: tuple[int, int]) -> None:
        if stamp != self.stamp:
            reason = "it changed after its header was read"
            raise corrupt(self.path, reason, "let no other program write there, then run again")


def corrupt(name: str | Path, reason: str, hint: str = DOWNLOAD_AGAIN) -> CorruptCheckpoint:
    return CorruptCheckpoint(f"{name} cannot be used", cause=reason, hint=hint)


def read_file(path: Path, max_bytes: int) -> bytes:
    """All of a small regular file."""
    with opened(path) as (fd, (size, _)):
        if size > max_bytes:
            raise corrupt(path, f"it has {size} bytes; {max_bytes} is the limit")
        return bytes(read_at(fd, bytearray(size), 0, path))


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, tuple[int, int]]]:
    """An open regular file and its stamp. A pipe or a device could block or never end."""
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise corrupt(path, _why(error), "check the path and its permissions") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise corrupt(path, "it is not a regular file")
        yield fd, stamp_of(status)
    finally:
        os.close(fd)


def stamp_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def read_at(fd: int, into: bytearray | memoryview, start: int, path: Path) -> memoryview:
    view = memoryview(into).cast("B")
    done = 0
    while done < len(view):
        try:
            # The kernel reads at most 2 GiB at once, and may always read less than asked for.
            count = os.preadv(fd, [view[done:]], start + done)
        except OSError as error:
            raise corrupt(path, _why(error), "check the disk the file is on") from error
        if count == 0:
            raise corrupt(path, f"it ends at byte {start + done}, in the middle of its data")
        done += count
    return view


def pieces_at(fd: int, start: int, end: int, path: Path) -> Iterator[memoryview]:
    """The bytes from `start` to `end`; each piece is good until the next is asked for."""
    buffer = memoryview(bytearray(min(PIECE_BYTES, end - start)))
    for position in range(start, end, PIECE_BYTES):
        yield read_at(fd, buffer[: end - position], position, path)


def _why(error: OSError) -> str:
    return error.strerror or str(error)
