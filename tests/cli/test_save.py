"""--save DIR: both files, or an error before the work begins."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import COMMANDS

from loftq_cli import cli
from loftq_cli.checkpoint import writer
from loftq_cli.schema import load_document


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, command in COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, command)


def test_json_and_text_side_by_side(loftq: Callable[..., Any], tmp_path: Path) -> None:
    directory = tmp_path / "new" / "results"
    done = loftq("noisy", "--json", "--save", directory)
    assert done.code == 0
    text, document = sorted(directory.iterdir(), key=lambda file: file.suffix, reverse=True)
    assert re.fullmatch(r"loftq_load_\d{8}T\d{6}Z\.json", document.name)
    assert text.name == document.with_suffix(".txt").name
    assert document.read_text("utf-8") == done.out
    summary = text.read_text("utf-8")
    assert summary.startswith("Loaded demo\n")
    assert "warning: beware" in summary, "a file has no stderr beside it"
    assert "\x1b" not in summary
    assert f"note: saved {document} and {text.name}" in done.err


def test_two_runs_in_one_second_keep_both(loftq: Callable[..., Any], tmp_path: Path) -> None:
    for _ in range(4):
        assert loftq("noisy", "--save", tmp_path).code == 0
    files = list(tmp_path.iterdir())
    assert len(files) == 8
    for file in files:
        if file.suffix == ".json":
            load_document(file.read_text("utf-8"))


def test_a_directory_that_cannot_be_made_stops_the_run_before_it_works(
    loftq: Callable[..., Any], tmp_path: Path
) -> None:
    # Below a regular file, because root may write into any directory.
    file = tmp_path / "file"
    file.write_text("")
    done = loftq("noisy", "--save", file / "results")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: cannot save results in {file / 'results'}\ncause: ")
    assert "printed" not in done.err


def test_a_directory_that_vanishes_during_the_run(
    loftq: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq_cli.commands import run

    monkeypatch.setattr(run, "prepare_save_directory", lambda directory: None)
    gone = tmp_path / "gone"
    assert loftq("noisy", "--save", gone).code == 0
    shutil.rmtree(gone)
    gone.write_text("")  # and something else is there
    done = loftq("noisy", "--json", "--save", gone)
    assert done.code == 1
    load_document(done.out)  # it is all that is left of the work
    assert f"error: could not save the result in {gone}\ncause: File exists" in done.err


def test_a_run_that_fails_leaves_no_directory(loftq: Callable[..., Any], tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for directory in (tmp_path / "a" / "b", there / "c", tmp_path / "d" / ("n" * 300)):
        assert loftq("nan", "--save", directory).code == 1
    assert [*tmp_path.rglob("*")] == [there]


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_disk_that_is_full_keeps_nothing_and_prints_the_result(
    fails_at: int, loftq: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def no_room(*_: object) -> None:
        calls.append(None)
        if len(calls) == fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.os, "posix_fallocate", no_room)
    done = loftq("noisy", "--json", "--save", tmp_path)
    assert done.code == 4
    load_document(done.out)
    assert f"error: could not save the result in {tmp_path}\ncause: No space left" in done.err
    assert list(tmp_path.iterdir()) == []
