"""The staged directory: what is kept, what is refused, what the next run repairs."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from patched_os import PatchedOs
from staged_run import SHARDS, contents, staged_run

from loftq_cli.checkpoint import staging as staging_module
from loftq_cli.checkpoint.staging import LOCK_FILE, MANIFEST_FILE, Staging
from loftq_cli.checkpoint.writer import write_bytes_atomically
from loftq_cli.errors import LoftqError, OutputExists, UsageError, WriteFailed

FINGERPRINT = {"bits": 4, "inputs": {"model.safetensors": {"bytes": 10}}}


class Interrupted(Exception):
    """Something that goes wrong in the middle of a run."""


def stage(output: Path, fingerprint: Any = FINGERPRINT, **options: Any) -> Staging:
    return Staging(output, fingerprint=fingerprint, **{"force": False, **options})


def add(staging: Staging, name: str, data: bytes = b"data", payload: Any = None) -> None:
    staging.record(name, write_bytes_atomically(staging.path(name), data), payload)


def unfinished(output: Path, *names: str, **options: Any) -> None:
    """A run that records these files and then fails."""
    with suppress(Interrupted), stage(output, **options) as staging:
        for name in names:
            add(staging, name, name.encode(), {"about": name})
        raise Interrupted


def refused(kind: type[LoftqError], output: Path, *args: Any, **options: Any) -> LoftqError:
    with pytest.raises(kind) as caught, stage(output, *args, **options):
        pass
    assert caught.value.hint
    return caught.value


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "work" / "OUT"


@pytest.fixture
def partial(out: Path) -> Path:
    return out.with_name("OUT.partial")


def test_a_run_leaves_its_output_and_nothing_else(out: Path) -> None:
    staged_run(out)
    assert names(out.parent) == ["OUT"]
    assert contents(out).keys() == {*SHARDS, "config.json"}


def test_the_output_is_absent_until_the_commit(out: Path, partial: Path) -> None:
    with stage(out) as staging:
        add(staging, "a")
        assert names(out.parent) == ["OUT.partial"]
        assert names(partial) == [LOCK_FILE, MANIFEST_FILE, "output"]
        staging.commit()
        assert contents(out) == {"a": b"data"}


def test_a_failed_run_is_continued(out: Path, partial: Path) -> None:
    unfinished(out, "a", "sub/b")
    assert not out.exists()
    assert partial.exists()
    with stage(out) as staging:
        assert {n: entry.payload for n, entry in staging.finished.items()} == {
            "a": {"about": "a"},
            "sub/b": {"about": "sub/b"},
        }
        add(staging, "c")
        staging.commit()
    assert contents(out) == {"a": b"a", "sub/b": b"sub/b", "c": b"data"}
    assert names(out.parent) == ["OUT"]


def test_a_run_without_a_finished_file_leaves_nothing(out: Path) -> None:
    unfinished(out)
    assert names(out.parent) == []


def test_leaving_without_a_commit_keeps_the_work(out: Path, partial: Path) -> None:
    with stage(out) as staging:
        add(staging, "a")
    assert not out.exists()
    assert partial.exists()


def test_only_intact_files_are_kept(out: Path, partial: Path) -> None:
    unfinished(out, "same", "shorter", "other", "gone", "sub/link")
    output = partial / "output"
    (output / "shorter").write_bytes(b"short")
    stamp = (output / "other").stat()
    (output / "other").write_bytes(b"OTHER")
    os.utime(output / "other", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    (output / "gone").unlink()
    shutil.rmtree(output / "sub")
    (output / "sub").mkdir()
    (output / "sub" / "link").symlink_to("/nowhere")
    with stage(out) as staging:
        assert list(staging.finished) == ["same"]
    assert list(json.loads((partial / MANIFEST_FILE).read_text())["finished"]) == ["same"]


def test_leftovers_are_reclaimed(out: Path, partial: Path) -> None:
    unfinished(out, "a")
    output = partial / "output"
    (output / ".model.safetensors.123.tmp").write_bytes(b"half")
    (output / "unrecorded").write_bytes(b"whole, but not recorded")
    (partial / f".{MANIFEST_FILE}.123.tmp").write_bytes(b"{")
    (output / "dir").symlink_to("/etc")
    with stage(out):
        assert names(output) == ["a"]
        assert names(partial) == [LOCK_FILE, MANIFEST_FILE, "output"]
    assert Path("/etc/hostname").parent.exists()


def test_the_manifest_cannot_point_elsewhere(out: Path, partial: Path) -> None:
    unfinished(out, "a")
    outside = out.parent / "outside"
    outside.write_bytes(b"a")
    manifest = json.loads((partial / MANIFEST_FILE).read_text())
    for name in ("../../outside", str(outside), "x/../a"):
        manifest["finished"][name] = manifest["finished"]["a"]
    (partial / MANIFEST_FILE).write_text(json.dumps(manifest))
    with stage(out) as staging:
        assert list(staging.finished) == ["a"]
    assert outside.read_bytes() == b"a"


def test_another_run_is_not_continued(out: Path, partial: Path) -> None:
    unfinished(out, "a")
    other = {"bits": 2, "inputs": {"model.safetensors": {"bytes": 11}}, "rank": 8}
    error = refused(OutputExists, out, other)
    assert error.cause == (
        "bits was 4 and is 2; inputs.model.safetensors.bytes was 10 and is 11; "
        "rank was null and is 8"
    )
    with stage(out) as staging:
        assert list(staging.finished) == ["a"]
    with stage(out, other, force=True) as staging:
        assert staging.finished == {}
        add(staging, "b")
        staging.commit()
    assert contents(out) == {"b": b"data"}


def test_another_run_without_a_finished_file_is_no_obstacle(out: Path, partial: Path) -> None:
    """It was killed before its first shard was done."""
    unfinished(out, "a")
    manifest = json.loads((partial / MANIFEST_FILE).read_text())
    (partial / MANIFEST_FILE).write_text(json.dumps({**manifest, "finished": {}}))
    with stage(out, {"bits": 2}) as staging:
        assert staging.finished == {}
        assert names(partial / "output") == []
        add(staging, "b")
    with stage(out, {"bits": 2}) as staging:
        assert list(staging.finished) == ["b"]


def test_a_long_list_of_differences_is_cut(out: Path) -> None:
    unfinished(out, "a")
    error = refused(OutputExists, out, {f"key{i}": "x" * 1000 for i in range(100)})
    assert len(error.cause or "") < 600


def test_force_continues_what_force_began(out: Path) -> None:
    staged_run(out, seed=1)
    unfinished(out, "a", force=True)
    with stage(out, force=True) as staging:
        assert list(staging.finished) == ["a"]
        staging.commit()
    assert contents(out) == {"a": b"a"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"fingerprint": 3, "finished": {}}',
        '{"fingerprint": {}, "finished": {"a": 3}}',
        '{"fingerprint": {}, "finished": {"a": {"bytes": 3}}}',
    ],
)
def test_a_damaged_manifest(out: Path, partial: Path, text: str) -> None:
    unfinished(out, "a")
    (partial / MANIFEST_FILE).write_text(text)
    assert "damaged" in (refused(OutputExists, out).cause or "")
    with stage(out, force=True) as staging:
        assert staging.finished == {}


def test_an_output_that_exists(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "mine").touch()
    assert "--force" in (refused(OutputExists, out).hint or "")
    assert names(out.parent) == ["OUT"]
    staged_run(out, force=True)
    assert contents(out).keys() == {*SHARDS, "config.json"}
    assert names(out.parent) == ["OUT"]


def test_an_output_that_is_a_file_is_never_replaced(out: Path) -> None:
    out.parent.mkdir()
    out.write_bytes(b"mine")
    refused(OutputExists, out)
    refused(OutputExists, out, force=True)
    assert contents(out.parent) == {"OUT": b"mine"}


def test_an_output_that_appears_meanwhile(out: Path, partial: Path) -> None:
    with stage(out) as staging:
        add(staging, "a")
        out.mkdir()
        with pytest.raises(OutputExists):
            staging.commit()
    assert names(out) == []
    assert partial.exists()


def test_a_link_to_the_output_stays(out: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "real").mkdir(parents=True)
    (disk / "real" / "former").touch()
    out.parent.mkdir()
    out.symlink_to(disk / "real")
    refused(OutputExists, out)
    staged_run(out, force=True)
    assert out.is_symlink()
    assert contents(disk / "real").keys() == {*SHARDS, "config.json"}
    assert (names(disk), names(out.parent)) == (["real"], ["OUT"])


def test_a_link_to_what_is_not_there_yet(out: Path, tmp_path: Path) -> None:
    out.parent.mkdir()
    out.symlink_to(tmp_path / "later")
    staged_run(out)
    assert out.is_symlink()
    assert (tmp_path / "later" / "config.json").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_modes_follow_the_umask(out: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        staged_run(out)
    finally:
        os.umask(before)
    entries = [out, *out.rglob("*")]
    assert {entry.stat().st_mode & 0o777 for entry in entries if entry.is_dir()} == {0o777 & ~umask}
    assert {entry.stat().st_mode & 0o777 for entry in entries if entry.is_file()} == {
        0o666 & ~umask
    }


def test_what_is_read_is_not_written(tmp_path: Path) -> None:
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for output in (
        source,
        source / "OUT",
        tmp_path / "models",
        tmp_path,
        tmp_path / "link" / "OUT",
    ):
        refused(UsageError, output, protected=[source], force=True)
    refused(UsageError, source / "OUT", protected=[tmp_path / "link"])
    assert names(tmp_path) == ["link", "models"]
    assert names(tmp_path / "models") == ["source"]
    with stage(tmp_path / "models" / "source-4bit", protected=[source]):
        pass


def test_the_places_one_stands_on_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, cwd = tmp_path / "a" / "home", tmp_path / "b" / "cwd"
    home.mkdir(parents=True)
    cwd.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(cwd)
    for output in (home, home.parent, cwd, Path(), Path(".."), Path("/")):
        refused(UsageError, output, force=True)
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_what_is_not_ours_is_in_the_way(out: Path, partial: Path, kind: str) -> None:
    out.parent.mkdir()
    if kind == "file":
        partial.touch()
    elif kind == "link":
        (out.parent / "elsewhere").mkdir()
        partial.symlink_to(out.parent / "elsewhere")
    else:
        partial.mkdir()
        (partial / "thesis.tex").touch()
    for force in (False, True):
        error = refused(OutputExists, out, force=force)
        assert "in the way" in error.what
    assert kind != "directory" or names(partial) == ["thesis.tex"]


def test_one_run_at_a_time(out: Path) -> None:
    with stage(out) as first:
        add(first, "a")
        for options in ({}, {"force": True}, {"fingerprint": {}}):
            error = refused(WriteFailed, out, **options)
            assert f"pid {os.getpid()} on {os.uname().nodename}" in (error.cause or "")
        first.commit()
    assert contents(out) == {"a": b"data"}
    assert names(out.parent) == ["OUT"]


def test_a_lock_file_that_is_deleted_while_we_wait_for_it(
    out: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that held it finished between our open and our flock."""
    attempts = []

    def flock(fd: int, operation: int) -> None:
        attempts.append(fd)
        if len(attempts) == 1:
            (partial / LOCK_FILE).unlink()
            partial.rmdir()
        fcntl.flock(fd, operation)

    monkeypatch.setattr(staging_module, "fcntl", _Fcntl(flock))
    with stage(out) as staging:
        add(staging, "a")
        assert len(attempts) == 2
        monkeypatch.undo()
        refused(WriteFailed, out)
        staging.commit()
    assert contents(out) == {"a": b"data"}


class _Fcntl:
    def __init__(self, flock: Any) -> None:
        self.flock = flock
        self.LOCK_EX, self.LOCK_NB = fcntl.LOCK_EX, fcntl.LOCK_NB


def test_a_file_system_without_locks(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(staging_module, "fcntl", _Fcntl(flock))
    assert refused(WriteFailed, out).cause == os.strerror(errno.ENOLCK)


class TestWhatAKilledRunLeaves:
    """States that a SIGKILL can leave, built by hand; the kill tests meet them by chance."""

    def test_nothing_but_the_directory(self, out: Path, partial: Path) -> None:
        partial.mkdir(parents=True)
        staged_run(out)
        assert names(out.parent) == ["OUT"]

    def test_the_lock_of_a_dead_process(self, out: Path, partial: Path) -> None:
        partial.mkdir(parents=True)
        (partial / LOCK_FILE).write_text("pid 1 on elsewhere\n" * 20)
        staged_run(out)
        assert names(out.parent) == ["OUT"]

    def test_output_before_its_manifest(self, out: Path, partial: Path) -> None:
        (partial / "output").mkdir(parents=True)
        assert staged_run(out) == SHARDS

    @pytest.mark.parametrize("force", [False, True])
    def test_the_swap_cut_in_two(self, out: Path, partial: Path, force: bool) -> None:
        """OUT is in `replaced`, and no OUT: the former output comes back first."""
        staged_run(out, seed=1)
        former = contents(out)
        unfinished(out, "a", force=True)
        out.rename(partial / "replaced")
        if force:
            with stage(out, force=True) as staging:
                assert contents(out) == former
                assert list(staging.finished) == ["a"]
                staging.commit()
            assert contents(out) == {"a": b"a"}
            assert names(out.parent) == ["OUT"]
        else:
            refused(OutputExists, out)
            assert contents(out) == former

    def test_the_former_output_not_yet_deleted(self, out: Path, partial: Path) -> None:
        staged_run(out)
        now = contents(out)
        (partial / "replaced").mkdir(parents=True)
        (partial / "replaced" / "old").touch()
        (partial / MANIFEST_FILE).write_text("{}")
        refused(OutputExists, out)
        assert contents(out) == now
        assert names(out.parent) == ["OUT"]

    def test_a_committed_run_not_yet_cleaned_up(self, out: Path, partial: Path) -> None:
        unfinished(out, "a")
        (partial / "output").rename(out)
        refused(OutputExists, out)
        assert names(out.parent) == ["OUT"]

    def test_an_unfinished_replacement_waits_for_force(self, out: Path, partial: Path) -> None:
        staged_run(out)
        unfinished(out, "a", force=True)
        refused(OutputExists, out)
        assert partial.exists()

    def test_a_former_output_that_cannot_come_back_is_not_deleted(
        self, out: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (partial / "replaced").mkdir(parents=True)
        (partial / "replaced" / "precious").touch()

        def broken(*_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(staging_module, "os", PatchedOs(replace=broken))
        refused(WriteFailed, out)
        assert names(partial / "replaced") == ["precious"]
