"""Every system call of a run fails once, in every way: nothing is damaged, nothing is lost."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
from patched_os import WRITES, FaultyOs, failure
from staged_run import contents, staged_run

from loftq_cli.checkpoint import staging, writer
from loftq_cli.errors import DoesNotFit, LoftqError, WriteFailed

CODES = [errno.ENOSPC, errno.EIO, errno.EINTR]


def run(output: Path, faulty: FaultyOs, monkeypatch: pytest.MonkeyPatch, *, force: bool) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer, "os", faulty)
        patch.setattr(staging, "os", faulty)
        staged_run(output, force=force)


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces"])
@pytest.mark.parametrize("code", CODES, ids=lambda code: errno.errorcode[code])
def test_every_call_fails_once(
    replaces: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = FaultyOs()
    staged_run(tmp_path / "whole")
    staged_run(tmp_path / "former", seed=1)
    expected, former = contents(tmp_path / "whole"), None
    if replaces:
        former = contents(tmp_path / "former")
        shutil.copytree(tmp_path / "former", tmp_path / "counted")
    run(tmp_path / "counted", counting, monkeypatch, force=replaces)
    assert contents(tmp_path / "counted") == expected
    assert set(counting.calls) == set(WRITES)

    for position, name in enumerate(counting.calls):
        output = tmp_path / str(position) / "OUT"
        output.parent.mkdir()
        if replaces:
            shutil.copytree(tmp_path / "former", output)
        at = f"{name}, call {position}"
        with pytest.raises(LoftqError) as caught:
            run(output, FaultyOs(position, failure(code)), monkeypatch, force=replaces)
        assert type(caught.value) is (DoesNotFit if code == errno.ENOSPC else WriteFailed), at
        assert caught.value.hint, at
        assert (contents(output) if output.exists() else None) == former, at
        assert {entry.name for entry in output.parent.iterdir()} <= {"OUT", "OUT.partial"}, at
        run(output, FaultyOs(), monkeypatch, force=replaces)
        assert contents(output) == expected, at
        assert [entry.name for entry in output.parent.iterdir()] == ["OUT"], at


def test_finished_files_survive_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = FaultyOs()
    run(tmp_path / "counted", counting, monkeypatch, force=False)
    last = len(counting.calls) - 1 - counting.calls[::-1].index("posix_fallocate")
    with pytest.raises(DoesNotFit):
        run(tmp_path / "OUT", FaultyOs(last, failure(errno.ENOSPC)), monkeypatch, force=False)
    assert staged_run(tmp_path / "OUT") == []
    assert contents(tmp_path / "OUT") == contents(tmp_path / "counted")
