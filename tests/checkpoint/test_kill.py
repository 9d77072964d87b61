"""Real processes: killed at any moment, and two on one output."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import killed_at_each_call
import pytest
import staged_run as program
from staged_run import contents, staged_run

import loftq_cli

FEW, MANY = 8, 50
# Between two tensors: makes a run long enough to be hit everywhere (about 0.2 s).
PAUSE = 0.02
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(loftq_cli.__file__).parents[1])}


def start(output: Path, *options: str) -> subprocess.Popen[str]:
    """A run in a process of its own, which has begun when this returns."""
    process = subprocess.Popen(
        [sys.executable, program.__file__, output, "--pause", str(PAUSE), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces"])
def test_killed_at_any_moment(count: int, replaces: bool, tmp_path: Path) -> None:
    staged_run(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    generator = random.Random(count)
    began = time.monotonic()
    assert finish(start(tmp_path / "timed")) == (0, "")
    duration = time.monotonic() - began
    survived = 0
    for number in range(count):
        output = tmp_path / str(number) / "OUT"
        allowed = [None, expected]
        if replaces:
            staged_run(output, seed=1)
            allowed.append(contents(output))
        options = ["--force"] if replaces else []
        process = start(output, *options)
        time.sleep(generator.uniform(0, duration))
        process.send_signal(signal.SIGKILL)
        code, _ = finish(process)
        survived += code == 0
        assert (contents(output) if output.exists() else None) in allowed
        if output.parent.exists():
            assert {entry.name for entry in output.parent.iterdir()} <= {"OUT", "OUT.partial"}

        code, errors = finish(start(output, *options))
        complete = not replaces and "already exists" in errors
        assert code == 0 or complete, errors
        assert contents(output) == expected
        assert [entry.name for entry in output.parent.iterdir()] == ["OUT"]
    assert survived < count


@pytest.mark.parametrize("options", [[], ["--force"]], ids=["new", "replaces"])
def test_killed_at_each_call(options: list[str], tmp_path: Path) -> None:
    """Where chance does not reach: every system call of a run is the last one once."""
    result = subprocess.run(
        [sys.executable, killed_at_each_call.__file__, tmp_path, *options],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 80


def test_two_processes_on_one_output(tmp_path: Path) -> None:
    first = start(tmp_path / "OUT")
    while not list(tmp_path.glob("OUT.partial/output/model-1.safetensors")):
        assert first.poll() is None
    first.send_signal(signal.SIGSTOP)  # or it might be done before the second one has begun
    code, errors = finish(start(tmp_path / "OUT"))
    first.send_signal(signal.SIGCONT)
    assert code == 1
    assert f"held by pid {first.pid} on {os.uname().nodename}" in errors
    assert finish(first)[0] == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["OUT"]
    staged_run(tmp_path / "whole")
    assert contents(tmp_path / "OUT") == contents(tmp_path / "whole")


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    process = start(tmp_path / "OUT")
    while not list(tmp_path.glob("OUT.partial/output/model-1.safetensors")):
        time.sleep(0.005)
    time.sleep(PAUSE)
    process.send_signal(signal.SIGINT)
    code, _ = finish(process)
    assert code != 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["OUT.partial"]
    assert not list(tmp_path.rglob("*.tmp"))
    assert "model-1.safetensors" not in staged_run(tmp_path / "OUT")
