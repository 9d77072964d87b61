"""stdout carries the result and nothing else, whoever prints whatever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import COMMANDS

from loftq_cli import cli
from loftq_cli.libraries import quiet_libraries
from loftq_cli.schema import load_document

FAKES = Path(__file__).with_name("fakes.py")
NOISE = (
    "printed",
    "written to descriptor 1",
    "echoed by a child",
    "left in Python's buffer",
    "left in C's buffer",
)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, command in COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, command)


def loftq_process(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FAKES, *argv],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | environ,
        check=False,
        timeout=60,
    )


def test_json_is_the_only_thing_on_stdout_even_with_children_and_c_buffers() -> None:
    done = loftq_process("noisy", "--json")
    assert done.returncode == 0, done.stderr
    document = load_document(done.stdout)
    assert document.command == "load"
    assert document.argv == ["loftq", "noisy", "--json"]
    assert document.resolved["device"].value == "cpu"
    assert set(document.timings_seconds) == {"read", "total"}
    for noise in NOISE:
        assert noise in done.stderr


def test_piped_output_is_headed_tsv(loftq: Callable[..., Any]) -> None:
    done = loftq("noisy")
    header, record = done.out.splitlines()
    assert dict(zip(header.split("\t"), record.split("\t"), strict=True))["parameters"] == "1000"
    for noise in NOISE[:4]:  # C's buffer is flushed at exit, which is not yet
        assert noise in done.err


def test_two_runs_in_one_process(loftq: Callable[..., Any]) -> None:
    for _ in range(2):
        assert json.loads(loftq("noisy", "--json").out)["results"]["parameters"] == 1000


def test_quiet_drops_progress_and_notes_but_no_warning(loftq: Callable[..., Any]) -> None:
    loud, quiet = loftq("noisy"), loftq("noisy", "--quiet")
    assert "reading: 20/20" in loud.err
    assert "note: a note" in loud.err
    assert "reading:" not in quiet.err
    assert "note:" not in quiet.err
    assert "warning: beware" in quiet.err
    assert quiet.out == loud.out


def test_progress_in_a_pipe_is_a_line_per_tenth(loftq: Callable[..., Any]) -> None:
    lines = [line for line in loftq("noisy").err.splitlines() if line.startswith("reading:")]
    assert len(lines) == 10
    assert lines[0].startswith("reading: 2/20, ")
    assert lines[0].endswith("left, layer.1")


def test_names_cannot_act_on_the_terminal(loftq: Callable[..., Any]) -> None:
    done = loftq("noisy")
    assert r"beware of layer[red]evil[/]\x1b[31m\u202e|`x`\ttail" in done.err
    assert "\x1b" not in done.err + done.out


def test_json_contradicting_a_format(loftq: Callable[..., Any]) -> None:
    done = loftq("noisy", "--json", "--format", "md")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: --json contradicts --format md")
    assert loftq("noisy", "--json", "--format", "json").code == 0


def test_a_nan_never_becomes_a_document(loftq: Callable[..., Any]) -> None:
    done = loftq("nan", "--json")
    assert (done.code, done.out) == (1, "")


def test_stdout_or_stderr_closed() -> None:
    def shell(redirect: str) -> subprocess.CompletedProcess[str]:
        line = f'"{sys.executable}" "{FAKES}" noisy --json {redirect}'
        return subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, check=False, timeout=60
        )

    closed = shell(">&-")
    assert closed.returncode == 1
    assert closed.stderr.startswith("error: there is nowhere to write the result\ncause: ")
    assert "printed" not in closed.stderr, "the work began"
    # A message has nowhere to go then; the exit code has.
    assert [shell(f"{more} >&- 2>&-").returncode for more in ("", "<&-")] == [1, 1]
    mute = shell("2>&-")
    assert mute.returncode == 0
    assert json.loads(mute.stdout)["schema"] == "loftq/load"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_stdout_is_an_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" "{FAKES}" noisy --json > /dev/full'],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 4
    assert "error: could not write the result to stdout\ncause: " in done.stderr


@pytest.mark.parametrize("line", ["noisy --format tsv", "--help"])
def test_a_reader_that_has_seen_enough(line: str) -> None:
    # The reader is gone before anything is written: the worst case of `| head -1`.
    done = subprocess.run(
        ["bash", "-c", f'set -o pipefail; "{sys.executable}" "{FAKES}" {line} | true'],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr.replace("failed", "")
    assert "Exception" not in done.stderr


def test_losing_the_reader_of_stderr_does_not_lose_the_work(tmp_path: Path) -> None:
    line = f'"{sys.executable}" "{FAKES}" late --save "{tmp_path}" 2>&1 >/dev/null | true'
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], check=False, timeout=60)
    assert done.returncode == 3, "the exit code that it would have had"
    assert len(list(tmp_path.iterdir())) == 2


def test_libraries_are_silenced_for_this_process_and_its_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {"TRANSFORMERS_VERBOSITY": "info"})
    quiet_libraries()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info", "what the user set stays"
