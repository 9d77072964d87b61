"""The files of a written directory against the report's list: names, sizes, hashes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from loftq_cli.checkpoint.adapter import ADAPTER_CONFIG, ADAPTER_DIRECTORY, ADAPTER_NAME
from loftq_cli.checkpoint.safetensors import shown
from loftq_cli.checkpoint.writer import hash_file
from loftq_cli.checks.battery import Finding
from loftq_cli.checks.written.directory import WRITE_AGAIN, Written
from loftq_cli.engines.report_file import is_plain
from loftq_cli.errors import CheckFailed
from loftq_cli.models.companions import OWN, WEIGHTS, why_not
from loftq_cli.models.source import README_FILE, REPORT_FILE
from loftq_cli.schema import WrittenFile

# The report cannot hold its own hash; those of earlier versions had none of the README either.
_UNLISTED = {REPORT_FILE, README_FILE}
# What git and the hub's client leave in a directory that went through them; no loader reads it.
_OTHER_TOOLS = {".git", ".gitattributes", ".cache"}


def files(written: Written) -> Finding:
    """Every listed file is there and is the same, and nothing else is."""
    claimed = written.claims.results.files
    for each in claimed:
        _require_plain(each.name)
    if not claimed:
        raise CheckFailed(f"{REPORT_FILE} lists no files", hint=WRITE_AGAIN)
    # What takes no reading comes first: it may spare an hour of it.
    for each in claimed:
        _require_ours(each)
        _require_size(written.directory, each)
    listed = {each.name for each in claimed}
    for name in _present(written.directory):
        if name not in listed:
            raise CheckFailed(
                f"{shown(name)} is not in the report's list of files",
                cause="it was put there after the directory was written, and may be loaded with it",
                hint=f"if nobody needs it, delete {written.directory / name}",
            )
    for each in claimed:
        written.progress.start(each.name)
        if hash_file(written.directory / each.name).sha256 != each.sha256:
            raise _changed(each, "it has the size and not the SHA-256 that the report gives")
        written.progress.advance(each.name)
    written.intact = True
    size = sum(each.bytes for each in claimed)
    return Finding(
        f"{len(claimed)} files, {size / 1e6:,.1f} MB: sizes and SHA-256 as reported",
        {"files": len(claimed), "hashed_bytes": size},
    )


def _require_plain(name: str) -> None:
    """A name with `..` or a root in it would lead us, and the hash of what is there, outside.

    Links are followed: in the hub's cache every file is one.
    """
    if not is_plain(name):
        raise CheckFailed(
            f"the report lists {shown(name)}, which is no plain name of a file in the directory",
            cause="loftq writes no such name: this report was made or changed by someone else",
            hint="do not use this directory unless you know where it comes from",
        )


def _require_ours(each: WrittenFile) -> None:
    """A list can be made to fit any file. Some are never written, whatever the source had."""
    folder, _, rest = each.name.partition("/")
    if folder == ADAPTER_DIRECTORY:
        known = each.name in (ADAPTER_NAME, f"{ADAPTER_DIRECTORY}/{ADAPTER_CONFIG}")
        reason = None if known else "the adapter has no such file"
    else:
        modules = {folder} if rest else set()
        reason = why_not(each.name, each.bytes, with_code=True, modules=modules)
        if reason == OWN or (reason == WEIGHTS and each.name.endswith(".safetensors")):
            return
    if reason is not None:
        raise CheckFailed(
            f"the report lists {shown(each.name)}, which loftq does not write",
            cause=reason,
            hint="do not use this directory unless you know where it comes from",
        )


def _require_size(directory: Path, claimed: WrittenFile) -> None:
    path = directory / claimed.name
    if not path.is_file():
        raise CheckFailed(
            f"{shown(claimed.name)} is missing", cause="the report lists it", hint=WRITE_AGAIN
        )
    size = path.stat().st_size
    if size != claimed.bytes:
        raise _changed(claimed, f"it has {size:,} bytes, and {claimed.bytes:,} were written")


def _changed(claimed: WrittenFile, cause: str) -> CheckFailed:
    return CheckFailed(
        f"{shown(claimed.name)} is not the file that was written", cause=cause, hint=WRITE_AGAIN
    )


def _present(directory: Path) -> Iterator[str]:
    """Every file below the directory that no one but loftq should have put there, by name."""
    for place, folders, names in os.walk(directory):
        here = Path(place)
        if here == directory:
            folders[:] = sorted(set(folders) - _OTHER_TOOLS)
            names = sorted(set(names) - _OTHER_TOOLS - _UNLISTED)
        # A link to a directory is not followed, and is nothing that loftq writes.
        links = [name for name in folders if (here / name).is_symlink()]
        for name in sorted([*names, *links]):
            yield (here / name).relative_to(directory).as_posix()
