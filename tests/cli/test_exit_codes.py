"""Every way to end: its exit code, its message, an empty stdout and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import COMMANDS

from loftq_cli import __version__, cli

FAKES = Path(__file__).with_name("fakes.py")


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOFTQ_DEBUG", raising=False)
    for name, command in COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, command)


ROOM = "hint: make room, then run it again\n"
RERUN = "hint: run it again with --debug to see where it happened\n"


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("loftq", 1, "error: it broke\ncause: it was old\nhint: loftq load --model demo\n"),
        ("bare", 1, "error: it broke\n"),
        ("check", 3, "error: cuda was expected\n"),
        ("fit", 4, "error: too large\n"),
        ("unexpected", 1, f"error: unexpected RuntimeError: first line second line\n{RERUN}"),
        ("exit", 1, f"error: unexpected SystemExit: 0\n{RERUN}"),
        ("child-pipe", 1, f"error: unexpected BrokenPipeError: [Errno 32] Broken pipe\n{RERUN}"),
        (
            "memory",
            4,
            "error: out of memory\nhint: free some memory, or use a box that has more\n",
        ),
        (
            "disk",
            4,
            "error: the disk is full\ncause: [Errno 28] No space left on device: '/x'\n" + ROOM,
        ),
        ("evil", 1, "error: no layer layer[red]evil[/]\\x1b[31m\\u202e|`x`\\ttail\n"),
    ],
)
def test_errors(loftq: Callable[..., Any], how: str, code: int, message: str) -> None:
    done = loftq("failing", "--how", how)
    assert (done.code, done.out, done.err) == (code, "", message)


def test_a_check_that_fails_after_the_result(loftq: Callable[..., Any]) -> None:
    done = loftq("late", "--json")
    assert done.code == 3
    assert done.out.startswith('{\n  "schema": "loftq/load"')
    assert done.err == "error: cuda was expected\ncause: there is none\n"


def test_debug_shows_the_traceback_before_the_message(
    loftq: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_option = loftq("failing", "--how", "unexpected", "--debug")
    monkeypatch.setenv("LOFTQ_DEBUG", "1")
    by_variable = loftq("failing", "--how", "unexpected")
    for done in (by_option, by_variable):
        assert done.err.startswith("Traceback (most recent call last):\n")
        assert done.err.endswith("\nerror: unexpected RuntimeError: first line second line\n")
        assert (done.code, done.out) == (1, "")


@pytest.mark.parametrize(
    ("line", "what", "hint"),
    [
        (["lode"], "no such command 'lode'. Did you mean 'load'?", "loftq --help"),
        (["--frobnicate"], "no such option: --frobnicate", "loftq --help"),
        (["load", "--frobnicate"], "no such option: --frobnicate", "loftq load --help"),
        (["load", "--modle", "x"], "(Possible options: --html, --model)", "loftq load --help"),
        (["load", "extra"], "(extra)", "loftq load --help"),
        (["load", "--dtype", "int3"], "'int3'", "loftq load --help"),
        (["load", "--format"], "'--format' requires an argument", "loftq load --help"),
        (["failing"], "missing option '--how'", "loftq failing --help"),
    ],
)
def test_usage_errors(loftq: Callable[..., Any], line: list[str], what: str, hint: str) -> None:
    done = loftq(*line)
    assert (done.code, done.out) == (2, "")
    error, advice = done.err.splitlines()
    assert error.startswith("error: ")
    assert what in error
    assert advice == f"hint: {hint}"


def test_no_command_is_a_usage_error_that_helps(loftq: Callable[..., Any]) -> None:
    done = loftq()
    assert (done.code, done.out) == (2, "")
    assert "Usage: loftq" in done.err


def test_help_and_version_are_results(loftq: Callable[..., Any]) -> None:
    for flag in ("--help", "-h"):
        done = loftq(flag)
        assert (done.code, done.err) == (0, "")
        assert "Usage: loftq" in done.out
    for number in (0, 1, 2, 3, 4, 130, 143):
        assert f"\n    {number} " in done.out
    done = loftq("--version")
    assert (done.code, done.out, done.err) == (0, f"loftq {__version__}\n", "")


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "error: interrupted\n"), (signal.SIGTERM, 143, "error: terminated\n")],
)
def test_signals_end_a_run_after_its_clean_up(
    tmp_path: Path, number: signal.Signals, code: int, message: str
) -> None:
    marker = tmp_path / "marker"
    process = subprocess.Popen(
        [sys.executable, FAKES, "sleepy", "--json", "--marker", marker],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "LOFTQ_DEBUG"},
    )
    deadline = time.monotonic() + 30
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (code, "", message)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "error: interrupted\n"), (signal.SIGTERM, 143, "error: terminated\n")],
)
def test_a_signal_that_nobody_heard_is_sent_again(
    number: signal.Signals, code: int, message: str
) -> None:
    done = subprocess.run(
        [sys.executable, FAKES, "deaf", "--json", "--number", str(int(number))],
        capture_output=True,
        text=True,
        timeout=25,  # it would sleep for longer
        env={key: value for key, value in os.environ.items() if key != "LOFTQ_DEBUG"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", message)


@pytest.mark.parametrize(
    ("how", "number", "code", "message"),
    [
        ("on", signal.SIGINT, 130, "cleaned up\nerror: interrupted\n"),
        ("on", signal.SIGTERM, 143, "cleaned up\nerror: terminated\n"),
        ("other", signal.SIGINT, 130, "error: interrupted\n"),
        ("finishes", signal.SIGINT, 130, "error: interrupted\n"),
    ],
)
def test_a_signal_that_a_library_swallowed(
    how: str, number: signal.Signals, code: int, message: str
) -> None:
    done = subprocess.run(
        [sys.executable, FAKES, "swallowing", "--json", "--how", how],
        capture_output=True,
        text=True,
        timeout=25,  # it would sleep for longer
        env={key: value for key, value in os.environ.items() if key != "LOFTQ_DEBUG"}
        | {"NUMBER": str(int(number))},
    )
    assert (done.returncode, done.stderr) == (code, message)


def test_ctrl_c_while_libraries_are_imported() -> None:
    for wait in (0.4, 0.7, 1.0):
        process = subprocess.Popen(
            [sys.executable, "-m", "loftq_cli", "compare", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={key: value for key, value in os.environ.items() if key != "LOFTQ_DEBUG"},
        )
        time.sleep(wait)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (130, "", "error: interrupted\n"), wait


def test_ctrl_c_in_code_that_a_library_made(tmp_path: Path) -> None:
    """A module that Python runs by name would then be ended by SIGINT, whatever it returns."""
    (tmp_path / "ended.py").write_text(
        "from loftq_cli import __main__, cli\n"
        "def main():\n"
        "    try:\n"
        "        exec('raise KeyboardInterrupt')\n"
        "    except KeyboardInterrupt:\n"
        "        return 130\n"
        "cli.main = main\n"
        "__main__.main()\n"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-m", "ended"], env=environ, check=False)
    assert done.returncode == 130


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """A shell script starts what it sends to the background with SIGINT ignored."""
    line = "import os, sys; from loftq_cli.signals import Signals\nwith Signals() as signals:\n"
    line += "    os.kill(os.getpid(), 2)\nsys.exit(signals.heard is not None)"
    command = 'trap "" INT; exec "$@"'
    done = subprocess.run(["sh", "-c", command, "sh", sys.executable, "-c", line], timeout=25)
    assert done.returncode == 0


def test_the_handlers_are_put_back(loftq: Callable[..., Any]) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [*map(signal.getsignal, numbers), sys.unraisablehook]
    loftq("--version")
    assert [*map(signal.getsignal, numbers), sys.unraisablehook] == before
