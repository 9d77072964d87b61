"""Odd input is refused before any work, with an error that says how to do better."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from loftq_cli.console import width_of
from tests.conftest import Outcome

Loftq = Callable[..., Outcome]
BYTES = "bad\udcff"  # as a name that is not UTF-8 comes into a program
DIGITS = "1" * 5000  # more than Python makes a number of
QUANTIZE = "quantize --dry-run -q"


@pytest.mark.parametrize(
    ("line", "odd", "code"),
    [
        # Names that no document could tell.
        ("quantize -q -o", BYTES, 2),
        ("quantize -q --dry-run -m", BYTES, 2),
        ("sweep-ranks -q --error --calibration-text", BYTES, 2),
        ("targets -q --save", BYTES, 2),
        ("generate -q -p a --adapter", BYTES, 2),
        ("generate -q -p", BYTES, 2),
        ("generate -q --prompts-file", BYTES, 2),
        ("compare -q --text", BYTES, 2),
        ("verify -q", BYTES, 2),
        ("verify -q x --source", BYTES, 2),
        ("report -q", BYTES, 2),
        # Nothing at all.
        *(
            (f"{QUANTIZE} {option}", "", 2)
            for option in (
                "-m",
                "-o",
                "--bits",
                "--init",
                "--target-modules",
                "--iterations",
                "--max-memory",
                "--calibration-text",
                "--device",
                "--save",
            )
        ),
        ("sweep-ranks -q --ranks", "", 2),
        ("compare -q --bits", "", 2),
        ("compare -q --text", "", 2),
        ("verify -q", "", 2),
        ("report -q", "", 2),
        # Numbers beyond all that can be meant.
        ("sweep-ranks -q --ranks", DIGITS, 2),
        ("compare -q --ranks", DIGITS, 2),
        ("sweep-ranks -q --batch-size", "9" * 30, 2),
        ("targets -q --rank", "9" * 30, 2),
        (f"{QUANTIZE} --iterations", DIGITS, 2),
        (f"{QUANTIZE} --iterations", "²", 2),
        (f"{QUANTIZE} --rank", "1000000000", 2),
        (f"{QUANTIZE} --rank", "1000000", 1),
        (f"{QUANTIZE} --seed", "9" * 23, 2),
        (f"{QUANTIZE} --bits", "4x1,4", 1),
        (f"{QUANTIZE} --bits", "4x9,2", 1),
        (f"{QUANTIZE} --lora-alpha", "nan", 2),
        (f"{QUANTIZE} --target-bits", "1e400", 2),
        (f"{QUANTIZE} --max-memory", DIGITS, 2),
        (f"{QUANTIZE} --device", "meta", 2),
        (f"{QUANTIZE} --device", f"cuda:{DIGITS}", 2),
        ("load -q --device", f"cuda:{DIGITS}", 2),
        ("generate -q -p a --temperature 1 --seed", "9" * 23, 2),
        ("generate -q -p a --temperature", "nan", 2),
        ("generate -q -p a --rank", "1000000", 1),
        # Places where nothing can be.
        ("targets -q -m", "~nosuchuser/x", 1),
        ("targets -q -m", "n" * 300, 1),
        ("generate -q -p a --adapter", "n" * 300, 1),
        ("report -q", "n" * 300, 2),
        ("report -q", "/dev/zero", 2),
        ("quantize -q -o", "a/" * 2000, 2),
        ("quantize -q --force -o", "n" * 300, 1),
        ("quantize -q --force -o", ".", 2),
        ("quantize -q -o", "/", 2),
        ("targets -q --save", "a/" * 2000, 2),
        ("generate -q --prompts-file", "/dev/zero", 2),
        ("generate -q -p a --temperature", "1e-300", 2),
        ("targets -q --save", "n" * 300, 1),
    ],
)
def test_it_is_refused(
    line: str,
    odd: str,
    code: int,
    loftq: Loftq,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = loftq(*shlex.split(line), odd)
    assert (done.code, done.out) == (code, "")
    assert "error: " in done.err
    assert "unexpected" not in done.err
    assert list(tmp_path.iterdir()) == []
    # The hint is not what was typed; where it is an option of this command, it is accepted.
    *_, option = line.split()
    for hint in re.findall(r"^hint: (.*)$", done.err, re.M):
        assert f"{option} {odd}" != hint
        advised = re.fullmatch(r"(--[a-z-]+ [\w.]+)(, or .*)?", hint)
        if advised and odd and line.startswith((QUANTIZE, "sweep-ranks")):
            again = loftq(*line.split()[:-1], *advised[1].split(" "))
            assert again.code == 0, again.err


@pytest.mark.parametrize("columns", ["²", "0", "-1", "", "x", "9" * 5000, "٣"])
def test_columns_that_are_no_number(columns: str) -> None:
    assert width_of(-1, {"COLUMNS": columns}) == 80


@pytest.mark.parametrize("value", [10**400, 0, -(10**25)])
def test_a_document_with_numbers_that_cannot_be(value: int, loftq: Loftq, tmp_path: Path) -> None:
    document = json.loads(loftq("quantize", "--dry-run", "--json", "-q").out)
    totals = document["results"]["totals"]
    document["results"]["totals"] = {
        key: value if isinstance(number, int) else number for key, number in totals.items()
    }
    file = tmp_path / "odd.json"
    file.write_text(json.dumps(document))
    for form in ("json", "table", "md"):
        done = loftq("report", file, "--format", form)
        assert done.code == 1
        assert "unexpected" not in done.err


def test_a_working_directory_that_was_deleted(
    loftq: Loftq, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    # Not even with nothing to look for in it: MKL would end the process with a code of its own.
    for line in ("targets -q", "generate -q -p a", "quantize -q -o out", "targets -q --save out"):
        done = loftq(*line.split())
        assert (done.code, done.out) == (1, "")
        assert "error: the working directory cannot be used" in done.err
    os.chdir(tmp_path)
