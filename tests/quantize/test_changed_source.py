"""A source that changes before a run goes on, or while it runs, is never mixed with the old one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.checkpoint import files, samples
from loftq_cli.checkpoint.index import open_checkpoint
from loftq_cli.checkpoint.safetensors import read_header
from loftq_cli.engines import job, shards, tasks
from loftq_cli.engines.fingerprint import state
from loftq_cli.models.spec import ResolvedModel
from loftq_cli.schema import ModelIdentity
from tests.battery import BATTERY
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
WEIGHTS = "model.safetensors"
TENSOR = "model.layers.0.mlp.up_proj.weight"


def build(directory: Path, seed: int) -> Path:
    BATTERY["llama"].build(seed=seed, dtype=torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build(tmp_path / "source", 0)


@pytest.fixture
def line(source: Path, tmp_path: Path) -> tuple[object, ...]:
    return ("quantize", "-m", source, "-o", tmp_path / "out", "--rank", 4, "--iterations", 1)


@pytest.fixture
def interrupted(
    line: tuple[object, ...], loftq: Loftq, monkeypatch: pytest.MonkeyPatch
) -> tuple[object, ...]:
    """The line of a run that has finished two of its files."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 20_000)
    real, calls = tasks.write_behind, []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(tasks, "write_behind", failing)
    assert loftq(*line).code == 130
    return line


def flip(path: Path) -> None:
    """Changes one value of a tensor, in place."""
    with path.open("r+b") as file:
        file.seek(read_header(path).tensors[TENSOR].start)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def twin_in_place(path: Path) -> None:
    path.write_bytes((build(path.parent.with_name("twin"), 1) / WEIGHTS).read_bytes())


def twin_by_its_name(path: Path) -> None:
    shutil.copy(build(path.parent.with_name("twin"), 1) / WEIGHTS, path.with_name("new"))
    path.with_name("new").replace(path)


def same_bytes_by_name(path: Path) -> None:
    shutil.copy(path, path.with_name("new"))
    path.with_name("new").replace(path)


@pytest.mark.parametrize("old_time", [True, False])
@pytest.mark.parametrize("change", [flip, twin_in_place, twin_by_its_name])
def test_other_weights_do_not_go_on_with_a_run(
    change: Callable[[Path], None],
    old_time: bool,
    source: Path,
    interrupted: tuple[object, ...],
    tmp_path: Path,
    loftq: Loftq,
) -> None:
    before = (source / WEIGHTS).stat()
    change(source / WEIGHTS)
    assert (source / WEIGHTS).stat().st_size == before.st_size
    if old_time:
        os.utime(source / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    for more in ((), ("--resume",)):
        outcome = loftq(*interrupted, *more)
        assert outcome.code == 1
        assert "sample_sha256" in outcome.err
        assert "--force" in outcome.err
    assert not (tmp_path / "out").exists()
    assert loftq(*interrupted, "--force").code == 0
    assert loftq("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda path: os.utime(path, ns=(0, 0)), "mtime_ns"),
        (same_bytes_by_name, "inode"),
    ],
)
def test_what_no_sample_shows_is_seen_by_time_and_inode(
    change: Callable[[Path], None],
    named: str,
    source: Path,
    interrupted: tuple[object, ...],
    loftq: Loftq,
) -> None:
    before = (source / WEIGHTS).stat()
    change(source / WEIGHTS)
    if named == "inode":
        os.utime(source / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    outcome = loftq(*interrupted)
    assert outcome.code == 1
    assert named in outcome.err


def test_the_same_source_goes_on(interrupted: tuple[object, ...], loftq: Loftq) -> None:
    outcome = loftq(*interrupted)
    assert outcome.code == 0, outcome.err
    assert "going on with" in outcome.err


def test_a_complete_output_is_known_by_the_weights_alone(
    line: tuple[object, ...], source: Path, tmp_path: Path, loftq: Loftq
) -> None:
    assert loftq(*line).code == 0
    os.utime(source / WEIGHTS, ns=(0, 0))
    shutil.copytree(source, tmp_path / "copy")
    for model in (source, tmp_path / "copy"):
        again = loftq(*line, "-m", model, "--resume")
        assert again.code == 0, again.err
        assert "already complete" in again.err
    flip(source / WEIGHTS)
    again = loftq(*line, "--resume")
    assert again.code == 1
    assert "already exists" in again.err


def test_a_hubs_snapshot_is_known_by_its_commit(source: Path) -> None:
    """What is fetched again, for a run that goes on on another machine, has another time."""
    identity = ModelIdentity(id="org/name", revision="abc", source="hub")
    found, checkpoint = ResolvedModel(identity, source), open_checkpoint(source)
    before = state(found, checkpoint)
    os.utime(source / WEIGHTS, ns=(0, 0))
    assert state(found, checkpoint) == before
    assert "abc" in str(before)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_a_source_that_changes_while_it_is_quantized(
    name: str,
    line: tuple[object, ...],
    source: Path,
    tmp_path: Path,
    loftq: Loftq,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When all of it has been read: before that, whoever reads a tensor sees it."""
    real, before = job.run_tasks, (source / WEIGHTS).stat()

    def then_changed(*args: Any) -> Any:
        done = real(*args)
        if name == WEIGHTS:
            flip(source / WEIGHTS)
            os.utime(source / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
        else:
            text = (source / name).read_text()
            (source / name).write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1'))
            assert (source / name).read_text() != text
        return done

    monkeypatch.setattr(job, "run_tasks", then_changed)
    outcome = loftq(*line)
    assert outcome.code == 1
    assert f"{source / name} changed while it was quantized" in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_sample_has_a_part_of_every_tensor(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "WHOLE_BYTES", 0)
    monkeypatch.setattr(samples, "_BLOCK", 64)
    path = source / WEIGHTS
    whole, before = path.read_bytes(), samples.samples(open_checkpoint(source))
    read: list[int] = []
    real = files.read_at

    def counted(fd: int, into: bytearray, *args: Any) -> Any:
        read.append(len(into))
        return real(fd, into, *args)

    monkeypatch.setattr(files, "read_at", counted)
    for info in read_header(path).tensors.values():
        changed = bytearray(whole)
        changed[info.start : info.end] = bytes(byte ^ 1 for byte in whole[info.start : info.end])
        path.write_bytes(changed)
        read.clear()
        assert samples.samples(open_checkpoint(source)) != before
        assert sum(read) < len(whole) / 2
    path.write_bytes(whole)
    assert samples.samples(open_checkpoint(source)) == before
    # So many tensors that not each can be asked: still few blocks, all over the file.
    monkeypatch.setattr(samples, "_BLOCKS", 16)
    monkeypatch.setattr(samples, "_MOST_OF_A_TENSOR", 1)
    read.clear()
    samples.samples(open_checkpoint(source))
    assert 8 <= len(read) <= 16
