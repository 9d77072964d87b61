"""On a terminal: a table, a bar, and what the environment says about colour."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

FAKES = Path(__file__).with_name("fakes.py")
SGR = re.compile(r"\x1b\[[0-9;]*m")


def on_terminal(*argv: str, **environ: str) -> str:
    """Runs with stdout and stderr on one pseudo-terminal of 80 columns; all that it showed."""
    ours, theirs = pty.openpty()
    keep = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, FAKES, *argv],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=keep | {"TERM": "xterm-256color", "COLUMNS": "80"} | environ,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # Linux says EIO when the other side is closed
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return shown.decode("utf-8").replace("\r\n", "\n")


def test_a_table_with_colour_and_a_bar_that_goes_away() -> None:
    shown = on_terminal("noisy")
    assert "Loaded demo" in shown
    assert "parameters\t" not in shown, "no TSV"
    assert "\x1b[1mLoaded demo\x1b[0m" in shown
    assert "20/20" in shown
    assert "reading: 20/20" not in shown, "no plain lines"
    # What is said while the bar runs stands on lines of its own, and a name is only text.
    assert "note:\x1b[0m a note\n" in shown
    assert r"beware of layer[red]evil[/]\x1b[31m\u202e|`x`\ttail" in shown
    # The table has the warning no second time.
    assert shown.count("beware") == 1


@pytest.mark.parametrize(
    "environ", [{"NO_COLOR": "1"}, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, {"TERM": "dumb"}]
)
def test_no_colour(environ: dict[str, str]) -> None:
    shown = on_terminal("noisy", **environ)
    assert "Loaded demo\n" in shown
    assert not SGR.search(shown)
    if environ.get("TERM") == "dumb":
        assert "\x1b" not in shown, "no cursor movement either"
        assert "reading: 20/20, took" in shown


def test_forced_colour_in_a_pipe_colours_tables_but_never_records() -> None:
    for form, coloured in (("table", True), ("tsv", False), ("md", False), ("json", False)):
        done = subprocess.run(
            [sys.executable, FAKES, "late", "--format", form],
            capture_output=True,
            text=True,
            env=os.environ | {"FORCE_COLOR": "1"},
            check=False,
            timeout=60,
        )
        assert bool(SGR.search(done.stdout)) is coloured, form
        assert "\x1b[1;31merror:\x1b[0m" in done.stderr
