"""Every system call of a run fails once, in every way: nothing is damaged, nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from patched_os import FaultyOs
from staged_run import contents, staged_run

from loftq_cli.checkpoint import staging, writer
from loftq_cli.errors import DoesNotFit, LoftqError, WriteFailed

CODES = [errno.ENOSPC, errno.EIO, errno.EINTR]


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is possible: hundreds of runs, and each waits for a disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def run(output: Path, faulty: FaultyOs, monkeypatch: pytest.MonkeyPatch, *, force: bool) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer, "os", faulty)
        patch.setattr(staging, "os", faulty)
        staged_run(output, force=force)


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces"])
@pytest.mark.parametrize("code", CODES, ids=lambda code: errno.errorcode[code])
def test_every_call_fails_once(
    replaces: bool, code: int, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = FaultyOs()
    staged_run(directory / "whole")
    staged_run(directory / "former", seed=1)
    expected, former = contents(directory / "whole"), None
    if replaces:
        former = contents(directory / "former")
        shutil.copytree(directory / "former", directory / "counted")
    run(directory / "counted", counting, monkeypatch, force=replaces)
    assert contents(directory / "counted") == expected
    assert {"open", "pwrite", "fsync", "replace", "posix_fallocate", "makedirs"} <= set(
        counting.calls
    )

    for position, name in enumerate(counting.calls):
        output = directory / str(position) / "OUT"
        output.parent.mkdir()
        if replaces:
            shutil.copytree(directory / "former", output)
        at = f"{name}, call {position}"
        with pytest.raises(LoftqError) as caught:
            run(output, FaultyOs(position, code), monkeypatch, force=replaces)
        assert type(caught.value) is (DoesNotFit if code == errno.ENOSPC else WriteFailed), at
        assert caught.value.hint, at
        assert (contents(output) if output.exists() else None) == former, at
        assert {entry.name for entry in output.parent.iterdir()} <= {"OUT", "OUT.partial"}, at
        run(output, FaultyOs(), monkeypatch, force=replaces)
        assert contents(output) == expected, at
        assert [entry.name for entry in output.parent.iterdir()] == ["OUT"], at


def test_finished_files_survive_a_full_disk(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = FaultyOs()
    run(directory / "counted", counting, monkeypatch, force=False)
    last = len(counting.calls) - 1 - counting.calls[::-1].index("posix_fallocate")
    with pytest.raises(DoesNotFit):
        run(directory / "OUT", FaultyOs(last, errno.ENOSPC), monkeypatch, force=False)
    assert staged_run(directory / "OUT") == []
    assert contents(directory / "OUT") == contents(directory / "counted")
