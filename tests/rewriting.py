"""What tests of `export` and of `merge` share: both write one directory anew from another."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

import loftq_cli
from loftq_cli.engines import rewriting

PROGRAM = Path(__file__).parent / "checkpoint" / "killed_at_each_call.py"


def calls_survived(kind: str, plan: Any, *options: str) -> int:
    """Every system call of writing this plan is the last one once; how many there are.

    Each time it is run again, and has to end in the same bytes.
    """
    with TemporaryDirectory() as name:
        file = Path(name) / "plan"
        file.write_bytes(pickle.dumps(plan))
        result = subprocess.run(
            [sys.executable, PROGRAM, name, *options, f"--{kind}", file],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(loftq_cli.__file__).parents[1]),
            },
            timeout=600,
        )
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[0])


@contextmanager
def stopped_at_the_second_file() -> Iterator[list[str]]:
    """Ctrl-C comes when one weight file is written; gives its name."""
    write, made = rewriting.write_safetensors, []

    def stopped(path: Path, *rest: Any) -> Any:
        if made:
            raise KeyboardInterrupt
        made.append(path.name)
        return write(path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewriting, "write_safetensors", stopped)
        yield made


@contextmanager
def never_again(made: list[str]) -> Iterator[None]:
    """None of these files is written here."""
    write = rewriting.write_safetensors

    def not_again(path: Path, *rest: Any) -> Any:
        assert path.name not in made
        return write(path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewriting, "write_safetensors", not_again)
        yield
