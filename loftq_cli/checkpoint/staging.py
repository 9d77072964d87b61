"""The staged output directory: written over hours, visible only once it is complete.

Everything is written beside the output, under a name that the next run finds again::

    OUT.partial/
      lock                   flock: one run at a time; says who holds it
      loftq-manifest.json    the run's fingerprint, and each finished file with size and hash
      output/                what will be OUT
      replaced/              the former OUT, for the moment in which it is replaced (--force)

The last step renames ``output`` to OUT, so that OUT is absent, the former one, or complete, and
neither lock nor manifest is ever in it. A killed run needs no cleaning up; the next one judges what
it left:

* finished files are kept if the fingerprint is the same and their hash is right;
* files that are not in the manifest, and half-written ones, are deleted;
* ``replaced`` without an OUT means that the swap was cut in two: it is renamed back;
* OUT without an ``output`` means that only the deletions are missing: they are done.
"""

# os, not pathlib, which would hide what is called and keep tests from letting a call fail.
# ruff: noqa: PTH103, PTH105, PTH106, PTH108, PTH111, PTH116, PTH208

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.index import load_json
from loftq_cli.checkpoint.safetensors import MAX_HEADER_BYTES
from loftq_cli.checkpoint.writer import (
    TEMPORARY_SUFFIX,
    WrittenFile,
    disk_errors,
    fsync_path,
    hash_file,
    write_bytes_atomically,
)
from loftq_cli.errors import CorruptCheckpoint, OutputExists, UsageError, WriteFailed

FORMAT_VERSION = 1
LOCK_FILE = "lock"
MANIFEST_FILE = "loftq-manifest.json"
OUTPUT_DIRECTORY = "output"
REPLACED_DIRECTORY = "replaced"


@dataclass(frozen=True)
class Finished:
    """A file of the manifest; `payload` is what a run that goes on has to know of it."""

    bytes: int
    sha256: str
    payload: Any


class Staging:
    """The directory OUT while it is being made::

        with Staging(out, fingerprint={...}, force=False, protected=[source]) as staging:
            for task in tasks:
                if task.file not in staging.finished:
                    written = write_safetensors(staging.path(task.file), ...)
                    staging.record(task.file, written, payload)
            staging.commit()

    Args:
        output: OUT. If it is a link to a directory, that directory is replaced and the link stays.
        fingerprint: what decides the bytes of the result, as JSON. An unfinished run with another
            fingerprint is not continued.
        force: replace OUT, and start over where the fingerprint differs.
        protected: directories that are read; OUT may be neither in nor around them.
    """

    def __init__(
        self,
        output: Path,
        *,
        fingerprint: Mapping[str, Any],
        force: bool,
        protected: Iterable[Path] = (),
    ) -> None:
        self.target = Path(os.path.realpath(output))
        self.partial = self.target.parent / f"{self.target.name}.partial"
        self.directory = self.partial / OUTPUT_DIRECTORY
        self.finished: dict[str, Finished] = {}
        self._replaced = self.partial / REPLACED_DIRECTORY
        self._fingerprint = _as_json({"format_version": FORMAT_VERSION, **fingerprint})
        self._force = force
        self._protected = [Path(os.path.realpath(place)) for place in protected]
        self._lock_fd = -1
        self._resumed = False

    def __enter__(self) -> Staging:
        _refuse_overlap(self.target, self._protected)
        if not os.path.lexists(self.partial):
            refuse_existing(self.target, self._force)
        with disk_errors(self.partial):
            self._refuse_foreign()
            self._lock()
            try:
                self._repair()
                refuse_existing(self.target, self._force)
                self._resume()
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def path(self, name: str) -> Path:
        """Where to write the file that will be OUT/`name`; its directory is made."""
        path = self.directory / name
        self.make_folder(path.parent)
        return path

    def make_folder(self, name: str | Path) -> None:
        """Make the folder that will be OUT/`name`, which may stay empty."""
        path = self.directory / name
        with disk_errors(path):
            os.makedirs(path, exist_ok=True)

    def record(self, name: str, written: WrittenFile, payload: Any = None) -> None:
        """Note a file as finished: no later run makes it again."""
        self.finished[name] = Finished(written.bytes, written.sha256, _as_json(payload))
        self._save()

    def start_over(self) -> None:
        """Forget every finished file: what is to be made is divided into other files now."""
        with disk_errors(self.directory):
            _delete(self.directory)
            os.makedirs(self.directory)
        self.finished = {}
        self._save()

    def commit(self) -> None:
        """Give everything its final name, by one rename."""
        with disk_errors(self.target):
            for folder, _, files in os.walk(self.directory):
                for name in (*files, "."):
                    fsync_path(Path(folder, name))
            refuse_existing(self.target, self._force)
            try:
                if os.path.lexists(self.target):
                    os.replace(self.target, self._replaced)
                os.replace(self.directory, self.target)
                fsync_path(self.target.parent)
            except BaseException:
                self._undo()
                raise
        self.finished.clear()

    def _undo(self) -> None:
        """Back to before the commit; what cannot be undone now is undone by the next run."""
        with suppress(OSError):
            if not self.directory.exists():
                os.replace(self.target, self.directory)
            if self._replaced.exists():
                os.replace(self._replaced, self.target)

    def _refuse_foreign(self) -> None:
        """What is not ours is not deleted, whatever its directory is called."""
        if not os.path.lexists(self.partial):
            return
        reason = "it is not a directory"
        if self.partial.is_dir() and not self.partial.is_symlink():
            foreign = [name for name in os.listdir(self.partial) if not _is_ours(name)]
            if not foreign:
                return
            reason = f"{min(foreign)!r} in it was not written by loftq"
        raise OutputExists(
            f"{self.partial} is in the way",
            cause=reason,
            hint="move it, or choose another --output",
        )

    def _lock(self) -> None:
        path = self.partial / LOCK_FILE
        while self._lock_fd < 0:
            os.makedirs(self.partial, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            with suppress(FileNotFoundError):  # deleted by a run that finishes just now
                fd = os.open(path, flags, 0o666)
                try:
                    self._hold(fd, path)
                finally:
                    if self._lock_fd < 0:
                        os.close(fd)

    def _hold(self, fd: int, path: Path) -> None:
        """Lock the open file, unless another run holds it or has deleted it since."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 300, 0).decode(errors="replace").strip()
            raise WriteFailed(
                f"another run is writing {self.target}",
                cause=f"{path} is held by {holder or 'a process that has just begun'}",
                hint="wait until it is done, or choose another --output",
            ) from None
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            self._lock_fd = fd

    def _leave(self) -> None:
        """Let go of the lock, after deleting the directory if there is no work in it.

        The lock file goes last: once it is gone, what is in the directory may be another run's.
        """
        if self._lock_fd < 0:
            return
        with suppress(OSError):
            if not self._has_work():
                for name in os.listdir(self.partial):
                    if name != LOCK_FILE:
                        _delete(self.partial / name)
                os.unlink(self.partial / LOCK_FILE)
        os.close(self._lock_fd)
        self._lock_fd = -1
        with suppress(OSError):
            os.rmdir(self.partial)

    def _has_work(self) -> bool:
        """Is there anything that a later run could use, or a former OUT that has no other place?"""
        if self._replaced.exists() and not self.target.exists():
            return True
        return bool(self.finished) if self._resumed else self.directory.exists()

    def _repair(self) -> None:
        """Undo or finish what a killed run was in the middle of."""
        for name in os.listdir(self.partial):
            if name.endswith(TEMPORARY_SUFFIX):
                os.unlink(self.partial / name)
        if self._replaced.exists():
            if self.target.exists():
                _delete(self._replaced)
            else:
                os.replace(self._replaced, self.target)
                fsync_path(self.target.parent)

    def _resume(self) -> None:
        fingerprint, finished = self._read_manifest()
        differences = _differences(fingerprint, self._fingerprint)
        if differences:
            if finished and not self._force:  # without a finished file nothing is lost
                raise OutputExists(
                    f"{self.partial} holds an unfinished run of other weights or settings",
                    cause="; ".join(differences[:5]) + ("; …" if len(differences) > 5 else ""),
                    hint="run with what it began with, or add --force to start over",
                )
            _delete(self.directory)
            finished = {}
        for folder, folders, files in os.walk(self.directory):
            links = [name for name in folders if Path(folder, name).is_symlink()]
            for path in (Path(folder, name) for name in files + links):
                if path.relative_to(self.directory).as_posix() not in finished:
                    os.unlink(path)
        self.finished = {
            name: entry
            for name, entry in finished.items()
            if _is_intact(self.directory, name, entry)
        }
        os.makedirs(self.directory, exist_ok=True)
        self._save()
        self._resumed = True

    def _read_manifest(self) -> tuple[dict[str, Any], dict[str, Finished]]:
        """Fingerprint and files of the run that was here before; without one, as if of this one."""
        path = self.partial / MANIFEST_FILE
        if not path.exists():
            return self._fingerprint, {}
        try:
            manifest = load_json(path, MAX_HEADER_BYTES)
            finished = {name: Finished(**entry) for name, entry in manifest["finished"].items()}
            return dict(manifest["fingerprint"]), finished
        except (CorruptCheckpoint, KeyError, TypeError, ValueError, AttributeError) as error:
            if self._force:
                return {}, {}
            raise OutputExists(
                f"{self.partial} holds an unfinished run that cannot be continued",
                cause=f"{MANIFEST_FILE} is damaged",
                hint="add --force to start over",
            ) from error

    def _save(self) -> None:
        manifest = {
            "fingerprint": self._fingerprint,
            "finished": {name: asdict(entry) for name, entry in self.finished.items()},
        }
        text = json.dumps(manifest, indent=1) + "\n"
        write_bytes_atomically(self.partial / MANIFEST_FILE, text.encode())


def refuse_existing(target: Path, force: bool) -> None:
    """OUT is there, and nobody said that it may be replaced.

    Raises:
        OutputExists
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputExists(
            f"{target} exists and is not a directory", hint="choose another --output"
        )
    if not force:
        raise OutputExists(
            f"{target} already exists",
            hint="add --force to replace it, or choose another --output",
        )


def refuse_unusable(output: Path) -> None:
    """An OUT that can never be written, known before anything else is looked at.

    Raises:
        UsageError: it lies around what the run stands on, or is too deep a path to be made.
        WriteFailed: the system takes no such path.
    """
    with disk_errors(output):
        target = Path(os.path.realpath(output))
        _refuse_overlap(target, [])
        if (depth := len(target.parts)) > 200:
            raise UsageError(f"--output lies {depth} directories deep", hint="choose another")
        with suppress(FileNotFoundError):
            os.lstat(f"{target}.partial")


def _refuse_overlap(target: Path, protected: list[Path]) -> None:
    """Never write into what is read, and never replace a directory that something stands on."""
    for place in protected:
        if target == place or place in target.parents:
            raise UsageError(
                f"the output {target} lies in the source {place}", hint="choose another --output"
            )
    kept = [*protected, Path(os.path.realpath(os.path.expanduser("~")))]
    with suppress(FileNotFoundError):  # the working directory may have been deleted
        kept.append(Path.cwd())
    for place in kept:
        if target == place or target in place.parents:
            raise UsageError(
                f"the output {target} would replace {place}", hint="choose another --output"
            )


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """{"bits": 4}, {"bits": 2} -> ["bits was 4 and is 2"]"""
    found = []
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            found += _differences(before, now, f"{prefix}{key}.")
        elif before != now:
            found.append(f"{prefix}{key} was {_brief(before)} and is {_brief(now)}")
    return found


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_intact(directory: Path, name: str, entry: Finished) -> bool:
    """Is the file still the one that was recorded? All of it is read: its bytes are the result."""
    path = directory / name
    if ".." in path.parts or directory not in path.parents:
        return False
    with suppress(CorruptCheckpoint):
        found = hash_file(path)
        return (found.bytes, found.sha256) == (entry.bytes, entry.sha256)
    return False


def _is_ours(name: str) -> bool:
    ours = (LOCK_FILE, MANIFEST_FILE, OUTPUT_DIRECTORY, REPLACED_DIRECTORY)
    return name in ours or (name.startswith(f".{MANIFEST_FILE}.") and name.endswith(".tmp"))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _as_json(value: Any) -> Any:
    """As it comes back from a file, so that what was read and what was given compare."""
    return json.loads(json.dumps(value))
