"""The whole `push` run: a directory that loftq wrote goes to a repository of a hub.

Every file is held against the size and hash of the report before anything is sent. Sent are the
files that the report lists, and the report; whatever else lies in the directory stays where it is.
"""

from __future__ import annotations

import time
from hashlib import sha256
from pathlib import Path

from loftq_cli import __version__
from loftq_cli.checkpoint.writer import hash_file
from loftq_cli.engines.hub import Repository, require_pushable
from loftq_cli.engines.hub_card import texts_for_hub
from loftq_cli.engines.report_file import Report
from loftq_cli.engines.written import (
    described_by,
    require_listed,
    require_present,
    require_same,
)
from loftq_cli.models.source import README_FILE, REPORT_FILE
from loftq_cli.record import Record
from loftq_cli.schema import PushResults, WrittenFile


def push(
    record: Record,
    directory: Path,
    report: Report,
    repository: str,
    *,
    private: bool = False,
    force: bool = False,
) -> PushResults:
    """Uploads ``directory``, whose report is ``report``, in one commit.

    Args:
        repository: NAMESPACE/NAME; it is made if it is not there.
        private: only its owners see it; one that is there has to be private already.
        force: one that has something else in it is written to. What another report there lists and
            this one does not is deleted, all else stays.

    Raises:
        UsageError: that is no name of a repository.
        CorruptCheckpoint: a file is not the one of the report.
        OutputExists: the repository has something else in it, or is public.
        PushFailed: the hub does not take it.
    """
    began = time.perf_counter()
    require_pushable(repository)
    with record.timing("prove"):
        _prove(directory, report, record)
    there = Repository(repository, private=private)
    deleted = there.stale(report, force=force)
    report, contents = texts_for_hub(directory, report, repository, record)
    own = contents[REPORT_FILE]
    files = [
        *report.results.files,
        WrittenFile(name=REPORT_FILE, bytes=len(own), sha256=sha256(own).hexdigest()),
    ]
    with record.timing("upload"):
        message = f"Upload with loftq {__version__}"
        commit = there.commit(directory, files, contents, deleted, message, record)
    return PushResults(
        directory=str(directory),
        repository=repository,
        url=there.url,
        private=there.private,
        commit=commit,
        files=files,
        deleted=deleted,
        bytes=sum(each.bytes for each in files),
        seconds=time.perf_counter() - began,
    )


def _prove(directory: Path, report: Report, record: Record) -> None:
    """Holds every file that is sent as it is against the report.

    The README is not, and people write into it: that is told.

    Raises:
        CorruptCheckpoint: one is missing or another, or the list is not whole.
    """
    files = report.results.files
    listed = {each.name: each for each in files}
    for name in (README_FILE, *described_by(report)):
        require_listed(directory, name, listed)
    for each in files:
        require_present(directory, each)
    with record.progress("proving", len(files)) as progress:
        for each in files:
            progress.start(each.name)
            path = directory / each.name
            if each.name != README_FILE:
                require_same(path, hash_file(path), each)
            elif not path.is_file() or hash_file(path).sha256 != each.sha256:
                record.warn(
                    f"{path} is not the one that was written, and is not sent: the repository gets "
                    "a card made from the report, to which you can add there"
                )
            progress.advance(each.name)
