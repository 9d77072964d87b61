"""`--workers`: the same bytes from several processes, and what becomes of those that are killed."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loftq_cli import quantize
from loftq_cli.engines import workers as engine
from loftq_cli.engines.workers import Threads, deal_out
from loftq_cli.errors import DoesNotFit, UsageError
from tests.conftest import Outcome
from tests.engines import full_disk
from tests.engines.conftest import LINE, OPTIONS, Watching, children
from tests.quantize.test_killed import Loftq, contents, finished

Command = Callable[..., Outcome]


def test_two_write_what_one_writes_also_if_one_is_killed(
    source: Path, expected: dict[str, bytes], recorded: list[str], tmp_path: Path
) -> None:
    def kill() -> None:
        assert len(multiprocessing.active_children()) == 2
        multiprocessing.active_children()[0].kill()

    heard = Watching(kill)
    out = tmp_path / "out"
    document = quantize(str(source), output=out, workers=2, listener=heard, **OPTIONS)  # type: ignore[arg-type]
    assert contents(out) == expected
    (note,) = heard.notes
    assert "killed by SIGKILL" in note
    assert note.startswith("worker ")
    assert note.endswith("safetensors is made again")
    assert len(set(heard.done)) == len(heard.done) == 56
    weights = [name for name in recorded if name.startswith("model-")]
    assert len(weights) == len(set(weights)) == 9
    assert document.resolved["workers"].value == 2
    assert multiprocessing.active_children() == []


def gone(processes: set[int]) -> bool:
    for _ in range(600):
        if not any(Path(f"/proc/{each}").exists() for each in processes):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_the_same_line_goes_on_and_no_worker_outlives_the_run(
    number: signal.Signals,
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    loftq: Command,
) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    line = ("quantize", "-m", source, "-o", out, "--workers", 2, *LINE)
    ended = Loftq(tmp_path, *line)
    while finished(tmp_path) < 4:
        assert ended.process.is_alive(), ended.err
    assert ended.process.pid is not None
    workers = children(ended.process.pid)
    ended.send(number)
    code = ended.wait()
    if out.exists():
        pytest.skip("the run was faster than the signal")
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert len(workers) >= 2
    assert gone(workers)
    assert "Traceback" not in ended.err
    if number == signal.SIGINT:
        assert "weight files are kept" in ended.err
        return
    kept = {path.name: path.stat().st_ino for path in (partial / "output").glob("model-*")}
    before = finished(tmp_path)
    # In one process now: how many there are is no part of what a run is.
    assert loftq("quantize", "-m", source, "-o", out, *LINE).code == 0
    assert contents(out) == expected
    same = sum((out / name).stat().st_ino == inode for name, inode in kept.items())
    assert same >= before // 2  # each with its part of the adapter


@pytest.mark.usefixtures("forked_workers")
def test_an_error_is_the_one_of_a_run_in_one_process(
    source: Path, tmp_path: Path, loftq: Command
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.5.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    said = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        done = loftq("quantize", "-m", broken, "-o", out, *LINE, "--workers", workers, "--quiet")
        assert done.code == 1
        said.append(done.err)
    assert said[0] == said[1]
    assert "model.layers.5.mlp.up_proj.weight" in said[0]


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_same_line_goes_on(
    source: Path, expected: dict[str, bytes], recorded: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_serve", full_disk.serve)
        with pytest.raises(DoesNotFit, match=f"no room to write .*{full_disk.NAME}") as caught:
            quantize(str(source), output=out, workers=2, **OPTIONS)  # type: ignore[arg-type]
    full_disk.require_told(caught.value, recorded)
    assert multiprocessing.active_children() == []
    # In one process now: how many there are is no part of what a run is.
    quantize(str(source), output=out, **OPTIONS)  # type: ignore[arg-type]
    assert contents(out) == expected
    full_disk.require_each_once(recorded)


def test_workers_that_do_not_fit_exit_4_before_anything_is_written(
    source: Path, tmp_path: Path, loftq: Command
) -> None:
    line = ("quantize", "-m", source, "-o", tmp_path / "out", *LINE, "--max-memory", "2GB")
    ends = [loftq(*line, "--workers", 5, *more) for more in ([], ["--dry-run"])]
    for done in ends:
        assert (done.code, done.out) == (4, "")
        assert "5 workers do not fit into the 2000MB of --max-memory" in done.err
        assert "--workers 2" in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("devices", "workers", "dealt"),
    [
        (["cpu"], None, ["cpu"]),
        (["cpu"], 3, ["cpu"] * 3),
        (["cuda:0", "cuda:1"], None, ["cuda:0", "cuda:1"]),
        (["cuda:1", "cuda:3"], 5, ["cuda:1", "cuda:3", "cuda:1", "cuda:3", "cuda:1"]),
    ],
)
def test_devices_are_dealt_out(devices: list[str], workers: int | None, dealt: list[str]) -> None:
    assert deal_out(devices, workers) == dealt


def test_what_cannot_be_dealt_out() -> None:
    with pytest.raises(UsageError, match="2 GPUs without work"):
        deal_out(["cuda:0", "cuda:1"], 1)


def test_threads_are_divided() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        assert [Threads.of_each(n).share for n in (1, 2, 5, 9)] == [5, 2, 1, 1]
        assert Threads.of_each(2).torch == 5
    finally:
        torch.set_num_threads(before)
